"""Which part of a full weight a tensor-parallel rank holds, and the way there and back."""

from __future__ import annotations

import torch
from torch import Tensor

from megazebra.parallel.collectives import all_gather
from megazebra.parallel.mesh import Group


def mark_sharded(parameter: Tensor, *, dim: int, full_size: int) -> None:
    """Note on the parameter that it is a slice along `dim` of a weight with `full_size` there.

    `tensor_model_parallel` is the name DeepSpeed looks for when it sums gradient norms over tp.
    `full_size` may be smaller than shard * tp: the last rows are padding (vocabularies).
    """
    parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
    parameter.partition_dim = dim  # type: ignore[attr-defined]
    parameter.full_size = full_size  # type: ignore[attr-defined]


def is_sharded(parameter: Tensor) -> bool:
    return getattr(parameter, "tensor_model_parallel", False)


def full_shape(parameter: Tensor, shard_shape: torch.Size) -> torch.Size:
    """Shape of the whole weight, without padding, of which `parameter` is a shard of `shard_shape`."""
    if not is_sharded(parameter):
        return shard_shape
    shape = list(shard_shape)
    shape[parameter.partition_dim] = parameter.full_size  # type: ignore[attr-defined]
    return torch.Size(shape)


def shard_of(full: Tensor, parameter: Tensor, shard_shape: torch.Size, tp: Group) -> Tensor:
    """The part of the whole weight that belongs to this rank; padding is zero."""
    if not is_sharded(parameter):
        return full
    dim: int = parameter.partition_dim  # type: ignore[attr-defined]
    rows = shard_shape[dim]
    start = min(tp.rank * rows, full.shape[dim])
    part = full.narrow(dim, start, min(rows, full.shape[dim] - start))
    if part.shape == shard_shape:
        return part
    padded = full.new_zeros(shard_shape)
    padded.narrow(dim, 0, part.shape[dim]).copy_(part)
    return padded


def unshard(shard: Tensor, parameter: Tensor, tp: Group) -> Tensor:
    """The whole weight, without padding, from every rank's shard (all ranks of tp call it)."""
    if not is_sharded(parameter):
        return shard
    dim: int = parameter.partition_dim  # type: ignore[attr-defined]
    return all_gather(shard, tp, dim=dim, label="unshard").narrow(dim, 0, parameter.full_size)  # type: ignore[attr-defined]
