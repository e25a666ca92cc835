"""What this rank owns of the training state, as views into DeepSpeed's buffers.

ZeRO flattens parameters into buffers and gives each data-parallel rank a slice, so a rank owns pieces: a
range of one weight's elements with its fp32 master value and its optimizer moments. Pieces are saved under
the weight's name and range, which says nothing about the buffers they came from: a run under another layout takes
from every piece what its own pieces overlap.

The fields read here are DeepSpeed's private ones (0.19): a new minor version must pass tests/checkpoint first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from megazebra.checkpoint.regions import Span, copy_overlap
from megazebra.checkpoint.store import CheckpointError, Entry, verify_file
from megazebra.checkpoint.tensor_file import StoredTensor, intended_crc32, stored_tensors
from megazebra.durable import sync_file
from megazebra.parallel.mesh import Group, ParallelMesh
from megazebra.train.engine import TrainEngine

MAX_FILE_BYTES = 2 << 30


@dataclass(frozen=True)
class Piece:
    """Elements [start, start + count) of this tensor-parallel rank's flattened shard of a weight.

    They lie at [offset, offset + count) of `buffer`, the fp32 tensor that the optimizer updates.
    """

    name: str
    start: int
    count: int
    buffer: Tensor
    offset: int

    def view(self, flat: Tensor) -> Tensor:
        return flat.detach().view(-1).narrow(0, self.offset, self.count)

    def key(self, what: str) -> str:
        return f"{self.name}|{self.start}|{what}"


def owned_pieces(engine: TrainEngine) -> Iterator[Piece]:
    """The pieces of this rank, over all data-parallel ranks disjoint and complete (ZeRO-0: all on each rank)."""
    outer = engine.deepspeed.optimizer
    for name, parameter in engine.module.named_parameters():
        piece: Piece | None
        if engine.zero_stage == 0:
            piece = Piece(name, 0, parameter.numel(), parameter, 0)
        elif engine.zero_stage == 3:
            piece = _zero3_piece(name, parameter, outer, engine.mesh.dp_cp.rank)
        else:
            piece = _zero12_piece(name, parameter, outer)
        if piece is not None:
            yield piece


def _zero12_piece(name: str, parameter: nn.Parameter, outer: Any) -> Piece | None:
    mapping = parameter._hp_mapping  # type: ignore[attr-defined]
    if mapping is None:  # all of it lies with other ranks
        return None
    # ZeRO-1 with bf16 is another class of DeepSpeed's, with another name for the same thing.
    buffers = getattr(outer, "single_partition_of_fp32_groups", None) or outer.fp32_groups_flat_partition
    return Piece(
        name,
        start=mapping.lp_fragment_address.start,
        count=mapping.lp_fragment_address.numel,
        buffer=buffers[mapping.param_group_index],
        offset=mapping.hp_fragment_address.start,
    )


def _zero3_piece(name: str, parameter: nn.Parameter, outer: Any, rank: int) -> Piece | None:
    group, offset, size = outer.grad_position[outer.get_param_id(parameter)]
    start = rank * size
    count = min(size, parameter.ds_numel - start)  # type: ignore[attr-defined]  # the last shard is padded
    return Piece(name, start, count, outer.fp32_partitioned_groups_flat[group], offset) if count > 0 else None


Tensors = dict[str, Tensor]


def snapshot(engine: TrainEngine, buffers: Tensors) -> Tensors:
    """Copies of this rank's pieces in host memory, by `Piece.key` (none where another rank holds the same).

    buffers: of an earlier snapshot, written into where they fit; so memory is taken once.
    """
    if engine.zero_stage == 0 and engine.mesh.dp_cp.rank > 0:
        return {}
    copies: Tensors = {}
    for piece in owned_pieces(engine):
        state = {"master": piece.buffer, **engine.optimizer.state[piece.buffer]}
        for what, value in state.items():
            if value is None:
                continue
            source = piece.view(value) if value.shape == piece.buffer.shape else value.detach()
            copy = buffers.get(piece.key(what))
            if copy is None or copy.shape != source.shape:
                copy = torch.empty(source.shape, dtype=source.dtype, pin_memory=source.device.type == "cuda")
            copies[piece.key(what)] = copy.copy_(source, non_blocking=True)
    if engine.device.type == "cuda":
        torch.cuda.synchronize(engine.device)
    return copies


def write_pieces(tensors: Tensors, folder: Path, mesh: ParallelMesh) -> dict[Path, Entry]:
    """Write a snapshot in files of bounded size, and wait until the disk has them; what the index should hold of each.

    While the disk takes a file, its checksum is computed and the next one is written.
    """
    entries = {}
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint-sync") as disk:
        synced = []
        for number, keys in enumerate(_in_files(tensors)):
            path = folder / f"tp_{mesh.tp.rank:03d}_dp_{mesh.dp_cp.rank:03d}_{number:02d}.safetensors"
            contents = {key: tensors[key] for key in keys}
            save_file(contents, path)
            synced.append(disk.submit(sync_file, path))
            pieces = [key.split("|") for key in keys if key.endswith("|master")]
            spans = {name: [int(start), tensors[f"{name}|{start}|master"].numel()] for name, start, _ in pieces}
            entries[path] = {
                "bytes": path.stat().st_size,
                "crc32": intended_crc32(path, contents),
                "tensor_rank": mesh.tp.rank,
                "pieces": spans,
            }
        for file in synced:
            file.result()  # raises what stopped it
    return entries


def _in_files(tensors: Tensors) -> Iterator[list[str]]:
    """Keys by file; all of a piece is in one."""
    keys: list[str] = []
    size = 0
    for _, group in groupby(tensors, key=lambda key: key.rpartition("|")[0]):
        piece = list(group)
        more = sum(tensors[key].nbytes for key in piece)
        if keys and size + more > MAX_FILE_BYTES:
            yield keys
            keys, size = [], 0
        keys += piece
        size += more
    if keys:
        yield keys


class SavedPieces:
    """The pieces of a checkpoint folder, whatever the layout that wrote it. Files are verified when first read."""

    def __init__(self, folder: Path, index: dict[str, Any], tp: Group) -> None:
        self.folder, self.index = folder, index
        # Weights that are not split are there once for every tensor-parallel rank, all alike.
        alike = tp.rank if index["layout"]["tensor"] == tp.size else 0
        self._opened: dict[str, dict[str, StoredTensor]] = {}
        self._spans: dict[str, list[tuple[Span, str]]] = {}
        for file, entry in index["files"].items():
            for name, (start, count) in entry["pieces"].items():
                if index["parameters"][name]["partition_dim"] is None and entry["tensor_rank"] != alike:
                    continue
                span = span_of(index["parameters"][name], index["layout"]["tensor"], entry["tensor_rank"], start, count)
                self._spans.setdefault(name, []).append((span, file))

    def overlapping(self, name: str, wanted: Span) -> Iterator[tuple[Span, dict[str, StoredTensor]]]:
        """Every piece that holds some of the wanted elements of a weight, with its tensors by what they are."""
        for span, file in self._spans.get(name, []):
            if span.overlaps(wanted):
                opened = self._opened.get(file)
                if opened is None:
                    opened = self._opened[file] = stored_tensors(verify_file(self.folder, file, self.index))
                prefix = f"{name}|{span.start}|"
                keys = [key for key in opened if key.startswith(prefix)]
                yield span, {key.removeprefix(prefix): opened[key] for key in keys}


def span_of(parameter: dict[str, Any], tp_size: int, tp_rank: int, start: int, count: int) -> Span:
    """Elements of a rank's shard of a weight, which the index describes by its whole shape and how it is split."""
    split = parameter["partition_dim"]
    # A weight that is not split is the same on all ranks.
    ranks = (tp_size, tp_rank) if split is not None else (1, 0)
    return Span(tuple(parameter["shape"]), split, *ranks, start, count)


def load_pieces(
    engine: TrainEngine, folder: Path, index: dict[str, Any], parameters: dict[str, Any], *, moments: bool = True
) -> None:
    """Fill the buffers of this rank's pieces from a checkpoint; `refresh_weights` must follow on all ranks.

    parameters: the weights of this run, as the index describes its own. moments: false leaves the optimizer as it is.
    Raises CheckpointError when a file is damaged or the pieces don't make up what this rank owns.
    """
    tp = engine.mesh.tp
    saved = SavedPieces(folder, index, tp)
    for piece in owned_pieces(engine):
        wanted = span_of(parameters[piece.name], tp.size, tp.rank, piece.start, piece.count)
        state = engine.optimizer.state[piece.buffer]
        found: Counter[str] = Counter()
        for span, tensors in saved.overlapping(piece.name, wanted):
            for what, stored in tensors.items():
                if not moments and what != "master":
                    continue
                if stored.shape == ():
                    # A count of updates: AdamW's fused kernel wants it where the moments are.
                    state[what] = stored.read(0, 1).squeeze().to(piece.buffer.device)
                    continue
                if what != "master" and what not in state:
                    state[what] = torch.zeros_like(piece.buffer)
                target = piece.buffer if what == "master" else state[what]
                # Mapped, which is faster than reading; opened for each, since its pages stay until the file is closed.
                with safe_open(stored.file, framework="pt") as opened:
                    values = opened.get_tensor(f"{piece.name}|{span.start}|{what}")
                found[what] += copy_overlap(span, values.to(target.device), wanted, piece.view(target))
                del values
        for what, elements in (found or {"master": 0}).items():
            if elements != wanted.real_elements:
                raise CheckpointError(
                    f"{folder} holds {elements} of the {wanted.real_elements} elements {piece.start} to "
                    f"{piece.start + piece.count} of {piece.name} ({what}) that tensor-parallel rank {tp.rank} needs"
                )


def refresh_weights(engine: TrainEngine) -> None:
    """Let the weights that the model computes with follow the fp32 masters (all ranks call it together)."""
    outer = engine.deepspeed.optimizer
    if engine.zero_stage in (1, 2):
        outer.update_lp_params()
    elif engine.zero_stage == 3:
        for group in range(len(outer.fp32_partitioned_groups_flat)):
            outer._reassign_or_swap_out_partitioned_parameters(group)
        if outer.persistent_parameters:  # small weights that ZeRO-3 keeps whole on every rank
            outer.persistent_parameters[0].all_gather(outer.persistent_parameters)
