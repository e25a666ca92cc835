"""What this rank owns of the training state, as views into DeepSpeed's buffers.

ZeRO flattens parameters into buffers and gives each data-parallel rank a slice, so a rank owns pieces: a
range of one weight's elements with its fp32 master value and its optimizer moments. Pieces are saved under
the weight's name and range, which says nothing about the buffers they came from.

The fields read here are DeepSpeed's private ones (0.19): a new minor version must pass tests/checkpoint first.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from megazebra.checkpoint.store import CheckpointError, verify_file
from megazebra.train.engine import TrainEngine


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


def save_pieces(engine: TrainEngine, folder: Path) -> list[Path]:
    """Write this rank's pieces; returns the files written (none where another rank holds the same)."""
    if engine.zero_stage == 0 and engine.mesh.dp_cp.rank > 0:
        return []
    tensors: dict[str, Tensor] = {}
    for piece in owned_pieces(engine):
        tensors[piece.key("master")] = piece.view(piece.buffer)
        for what, value in engine.optimizer.state[piece.buffer].items():
            if value is None:
                continue
            tensors[piece.key(what)] = piece.view(value) if value.shape == piece.buffer.shape else value
    path = folder / file_name(engine)
    # Copies, since safetensors refuses tensors that share memory, as the pieces of one buffer do.
    save_file({key: value.detach().to("cpu", copy=True).contiguous() for key, value in tensors.items()}, path)
    return [path]


def load_pieces(engine: TrainEngine, folder: Path, index: dict[str, Any]) -> None:
    """Copy the saved pieces back into the buffers they came from; `refresh_weights` must follow on all ranks.

    Raises CheckpointError when a file is damaged or holds other pieces than this rank owns.
    """
    path = verify_file(folder, file_name(engine), index)
    with safe_open(path, framework="pt") as file:
        saved: dict[str, dict[str, str]] = {}
        for key in file.keys():  # noqa: SIM118 (the file is no mapping)
            name, start, what = key.split("|")
            saved.setdefault(f"{name}|{start}", {})[what] = key
        for piece in owned_pieces(engine):
            keys = saved.pop(f"{piece.name}|{piece.start}", None)
            if keys is None or file.get_slice(keys["master"]).get_shape() != [piece.count]:
                raise CheckpointError(f"{path} does not hold elements {piece.start}.. of {piece.name}")
            piece.view(piece.buffer).copy_(file.get_tensor(keys.pop("master")))
            state = engine.optimizer.state[piece.buffer]
            for what, key in keys.items():
                value = file.get_tensor(key)
                if value.shape == torch.Size([piece.count]) and value.ndim:
                    if what not in state:
                        state[what] = torch.zeros_like(piece.buffer)
                    piece.view(state[what]).copy_(value)
                else:
                    # A count of updates: AdamW's fused kernel wants it where the moments are.
                    state[what] = value.to(piece.buffer.device)
    if saved:
        raise CheckpointError(f"{path} holds pieces this run has no place for, such as {next(iter(saved))}")


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


def file_name(engine: TrainEngine) -> str:
    owner = 0 if engine.zero_stage == 0 else engine.mesh.dp_cp.rank
    return f"tp_{engine.mesh.tp.rank:03d}_dp_{owner:03d}.safetensors"
