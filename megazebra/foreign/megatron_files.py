"""Folders that Megatron-LM wrote in its format "torch", one file per tensor-parallel rank.

    latest_checkpointed_iteration.txt   number of the newest folder, or 'release'
    iter_0000100/
      mp_rank_00/model_optim_rng.pt     the rank's weights under 'model', the options under 'args'
      mp_rank_01/model_optim_rng.pt

Weights are read in the precision they were trained in; fp32 masters and moments, which Megatron orders in several ways,
are not.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megazebra.checkpoint.store import CheckpointError
from megazebra.checkpoint.tensor_file import StoredTensor
from megazebra.foreign.megatron_options import saved_options
from megazebra.foreign.shards import Shard, ShardedModel
from megazebra.foreign.torch_files import read_structure

_POINTER = "latest_checkpointed_iteration.txt"
_FILE = "model_optim_rng.pt"
_RANK_FOLDER = re.compile(r"mp_rank_(\d+)(_.*)?")


def find_megatron_folder(path: Path) -> Path | None:
    """The folder itself, or the newest one in it; None where Megatron has written none.

    Raises CheckpointError when the newest one is missing.
    """
    folder = path
    if (path / _POINTER).is_file():
        newest = (path / _POINTER).read_text(errors="replace").strip()
        folder = path / (f"iter_{int(newest):07d}" if newest.isdigit() else newest)
        if not folder.is_dir():
            raise CheckpointError(f"{folder} is not there, which {path / _POINTER} names; give another folder")
    return folder if folder.is_dir() and any(map(_is_megatrons, folder.iterdir())) else None


def read_megatron_folder(folder: Path) -> ShardedModel:
    """Where every shard lies in the files of a folder; reads what describes them only.

    Raises CheckpointError naming what is missing, damaged, or cannot be read so.
    """
    trees = [read_structure(path) for path in _files(folder)]
    ranks = []
    for rank, tree in enumerate(trees):
        if "model" not in tree:
            what = "stages of a virtual pipeline; save it without one" if "model0" in tree else "no model"
            raise CheckpointError(f"{folder}: rank {rank} holds {what}")
        ranks.append({name: Shard.of(stored) for name, stored in _tensors(tree["model"])})
    options = saved_options(trees[0], str(folder))
    return ShardedModel(
        f"{folder} (Megatron, {len(ranks)} tensor-parallel ranks)",
        ranks,
        options,
        {"step": int(trees[0].get("iteration", 0)), "samples": int(options.get("consumed_train_samples", 0))},
    )


def _files(folder: Path) -> list[Path]:
    if (folder / ".metadata").exists():
        raise CheckpointError(
            f"{folder} is in one of Megatron's distributed formats; convert it with --ckpt-convert-format torch"
        )
    found = {}
    for path in folder.iterdir():
        name = _RANK_FOLDER.fullmatch(path.name)
        if name and name[2]:
            raise CheckpointError(
                f"{path} belongs to a stage of a pipeline or to experts; save it with pipeline- and expert-parallel "
                "size 1"
            )
        if name:
            found[int(name[1])] = path / _FILE
    for rank in range(max(found, default=0) + 1):
        if rank not in found:
            raise CheckpointError(f"{folder} has no mp_rank_{rank:02d}; copy the folder again")
    return [found[rank] for rank in sorted(found)]


def _is_megatrons(path: Path) -> bool:
    return path.name == ".metadata" or _RANK_FOLDER.fullmatch(path.name) is not None


def _tensors(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, StoredTensor]]:
    """Tensors under dotted names; Megatron nested dictionaries before it had Megatron-core."""
    found: list[tuple[str, StoredTensor]] = []
    for name, value in tree.items():
        if isinstance(value, dict):
            found += _tensors(value, f"{prefix}{name}.")
        elif isinstance(value, StoredTensor):
            found.append((f"{prefix}{name}", value))
    return found
