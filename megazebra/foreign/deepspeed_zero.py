"""Folders that DeepSpeed's `engine.save_checkpoint` wrote under ZeRO 1, 2 or 3, without DeepSpeed.

latest                                                name of the newest folder
global_step10/
  mp_rank_00_model_states.pt                          names and shapes of the weights (ZeRO-3: a file per rank,
                                                      zero_pp_rank_0_mp_rank_00_model_states.pt)
  [bf16_]zero_pp_rank_0_mp_rank_00_optim_states.pt    fp32 masters and moments of a data-parallel rank (pp_rank!)
                                                      and a tensor-parallel rank, in flat buffers
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from megazebra.checkpoint.store import CheckpointError
from megazebra.checkpoint.tensor_file import StoredTensor
from megazebra.checkpoint.zero_ranges import Range, split_each, split_together
from megazebra.foreign.megatron_options import saved_options
from megazebra.foreign.shards import Piece, Shard, ShardedModel
from megazebra.foreign.torch_files import read_structure

_OPTIMIZER_FILE = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
_GAP = ""  # a name that no weight has


def find_zero_folder(path: Path) -> Path | None:
    """The folder itself, or the newest one in it; None where DeepSpeed has written none.

    Raises CheckpointError when it has, without ZeRO.
    """
    latest = path / "latest"
    folder = path / latest.read_text(errors="replace").strip() if latest.is_file() else path
    if not folder.is_dir() or not any(folder.glob("*_model_states.pt")):
        return None
    if not any(folder.glob("*_optim_states.pt")):
        raise CheckpointError(
            f"{folder} has no *_optim_states.pt, in which ZeRO keeps the fp32 weights; copy the folder again, or take "
            "one that was saved under ZeRO"
        )
    return folder


def read_zero_folder(folder: Path) -> ShardedModel:
    """Where every shard lies in the files of a folder; reads what describes them only.

    Raises CheckpointError naming what is missing, damaged, or cannot be read so.
    """
    files = _optimizer_files(folder)
    states: dict[int, dict[str, Any]] = {}
    ranks = []
    for mp_rank, of_rank in sorted(files.items()):
        states[mp_rank] = read_structure(_model_file(folder, mp_rank))
        ranks.append(_shards(states[mp_rank], of_rank))
    first = states[0]
    return ShardedModel(
        f"{folder} (DeepSpeed {first.get('ds_version')}, {len(files)} tensor- x {len(files[0])} data-parallel ranks)",
        ranks,
        saved_options(first, str(folder)),
        {ours: first[theirs] for ours, theirs in (("step", "global_steps"), ("samples", "global_samples"))},
    )


def _optimizer_files(folder: Path) -> dict[int, list[Path]]:
    """For every tensor-parallel rank its data-parallel ranks' files, in order."""
    found: dict[int, dict[int, Path]] = defaultdict(dict)
    for path in folder.glob("*_optim_states.pt"):
        name = _OPTIMIZER_FILE.fullmatch(path.name)
        if name is None:
            raise CheckpointError(
                f"{path} is not named as ZeRO's files are; experts and pipelines are not supported, take a checkpoint "
                "of ZeRO 1, 2 or 3"
            )
        found[int(name[2])][int(name[1])] = path
    ranks = max(len(files) for files in found.values())
    for mp_rank in range(max(found) + 1):
        for dp_rank in range(ranks):
            if dp_rank not in found[mp_rank]:
                raise CheckpointError(
                    f"{folder} has no *zero_pp_rank_{dp_rank}_mp_rank_{mp_rank:02d}_optim_states.pt, and other ranks' "
                    "are there; copy the folder again"
                )
    return {mp_rank: [files[dp_rank] for dp_rank in range(ranks)] for mp_rank, files in found.items()}


def _model_file(folder: Path, mp_rank: int) -> Path:
    sharded = folder / f"zero_pp_rank_0_mp_rank_{mp_rank:02d}_model_states.pt"
    return sharded if sharded.exists() else folder / f"mp_rank_{mp_rank:02d}_model_states.pt"


def _shards(model: dict[str, Any], files: Sequence[Path]) -> dict[str, Shard]:
    """Of one tensor-parallel rank."""
    if model.get("frozen_param_shapes"):
        raise CheckpointError(
            f"{files[0].parent}: {next(iter(model['frozen_param_shapes']))} was frozen; only models that were trained "
            "whole can be read"
        )
    states = [read_structure(path)["optimizer_state_dict"] for path in files]
    for path, state in zip(files, states, strict=True):
        count = state["partition_count"]
        count = max(count) if isinstance(count, list) else count
        if count != len(files):
            raise CheckpointError(f"{path} is one of {count} ranks' files, and {len(files)} are there; copy them again")
    shapes = {name: tuple(shape) for group in model["param_shapes"] for name, shape in group.items()}
    pieces: dict[str, dict[str, list[Piece]]] = {name: defaultdict(list) for name in shapes}
    scalars: dict[str, dict[str, float]] = {}
    of_ranks = [_groups(state, model["param_shapes"]) for state in states]
    for rank, groups in enumerate(of_ranks):
        for number, group in enumerate(groups):
            # The last rank's buffers may be saved without their padding.
            for owned in group.owned(len(files), rank, part=of_ranks[0][number].elements):
                for what, buffers in group.buffers.items():
                    pieces[owned.name][what] += _pieces(owned, buffers)
                scalars[owned.name] = group.scalars
    return {name: Shard(shape, dict(pieces[name]), scalars[name]) for name, shape in shapes.items()}


@dataclass(frozen=True)
class _Group:
    """Weights that lie end to end in a rank's buffers. sizes: their names and elements, with the gaps between them.

    buffers: for 'master' and every moment what holds it, several under ZeRO-3, which cuts them (sub-groups).
    """

    sizes: list[tuple[str, int]]
    buffers: dict[str, list[StoredTensor]]
    scalars: dict[str, float]
    zero3: bool

    @property
    def elements(self) -> int:
        return sum(prod(buffer.shape) for buffer in self.buffers["master"])

    def owned(self, ranks: int, rank: int, part: int) -> Iterator[Range]:
        split = split_each(self.sizes, ranks, rank) if self.zero3 else split_together(self.sizes, part, rank)
        return (piece for piece in split if piece.name != _GAP)


def _groups(state: dict[str, Any], shapes: Sequence[dict[str, Sequence[int]]]) -> list[_Group]:
    zero3 = "fp32_flat_groups" in state
    masters = state["fp32_flat_groups" if zero3 else "single_partition_of_fp32_groups"]
    inner = state["optimizer_state_dict" if zero3 else "base_optimizer_state"]
    # Nothing before the first step; "elastic" checkpoints, which DeepSpeed has given up, hold a list instead.
    entries = inner["state"] if isinstance(inner, dict) else {}
    states = [{"master": master, **entries.get(number, {})} for number, master in enumerate(masters)]
    sizes = [[(name, prod(shape)) for name, shape in group.items()] for group in shapes]
    if zero3:
        return [_group([size for group in sizes for size in group], states, zero3)]
    if gaps := state.get("param_alignment_paddings"):
        sizes = [_with_gaps(group, of_group) for group, of_group in zip(sizes, gaps, strict=True)]
    return [_group(group, [held], zero3) for group, held in zip(sizes, states, strict=True)]


def _with_gaps(sizes: Sequence[tuple[str, int]], gaps: Sequence[int]) -> list[tuple[str, int]]:
    return [entry for size, gap in zip(sizes, gaps, strict=True) for entry in (size, (_GAP, gap))]


def _group(sizes: list[tuple[str, int]], states: list[dict[str, Any]], zero3: bool) -> _Group:
    """states: what each buffer of the group holds, by what it is."""
    buffers: dict[str, list[StoredTensor]] = defaultdict(list)
    for held in states:
        for what, value in held.items():
            if isinstance(value, StoredTensor) and value.shape:
                buffers[what].append(value)
    counts = {what: value for what, value in states[0].items() if what not in buffers}
    scalars = {
        what: value.read(0, 1).item() if isinstance(value, StoredTensor) else float(value)
        for what, value in counts.items()
        if isinstance(value, StoredTensor | int | float)
    }
    return _Group(sizes, dict(buffers), scalars, zero3)


def _pieces(owned: Range, buffers: Sequence[StoredTensor]) -> Iterator[Piece]:
    """Where a range lies in buffers that continue each other."""
    position, found = 0, 0
    for buffer in buffers:
        begin, end = max(owned.offset, position), min(owned.offset + owned.count, position + prod(buffer.shape))
        if begin < end:
            yield Piece.part_of(buffer, begin - position, end - begin, owned.start + begin - owned.offset)
            found += end - begin
        position += prod(buffer.shape)
    if found != owned.count:
        raise CheckpointError(
            f"{buffers[0].file} holds {found:,} of {owned.count:,} elements of {owned.name} that it should; it was "
            "written by a version of DeepSpeed that lays weights out differently"
        )
