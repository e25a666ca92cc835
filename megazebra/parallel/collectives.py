"""Every collective of the framework: counted, and differentiable where the model needs it.

Groups of one rank cost nothing: the tensor comes back as it is and nothing is counted.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megazebra.parallel.mesh import Group

# torch 2.13 renamed them; the old names warn there and are all there is before.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def all_reduce(tensor: Tensor, group: Group, *, maximum: bool = False, label: str = "") -> Tensor:
    """Sum (or maximum) of `tensor` over the group, written into `tensor`, which is returned."""
    if group.size == 1:
        return tensor
    group.traffic.record("all_reduce", group.name, group.size, tensor.nbytes, label)
    with group.traffic.communicating(group.name):
        dist.all_reduce(tensor, dist.ReduceOp.MAX if maximum else dist.ReduceOp.SUM, group=group.process_group)
    return tensor


def all_gather(shard: Tensor, group: Group, *, dim: int, label: str = "") -> Tensor:
    """The shards of all ranks joined along `dim` in rank order: [..., n, ...] -> [..., n P, ...]."""
    if group.size == 1:
        return shard
    # The collective joins along dimension 0; for one sequence per rank (B = 1) moving it there copies nothing.
    leading = shard.movedim(dim, 0).contiguous()
    full = leading.new_empty((leading.shape[0] * group.size, *leading.shape[1:]))
    group.traffic.record("all_gather", group.name, group.size, full.nbytes, label)
    with group.traffic.communicating(group.name):
        _all_gather(full, leading, group=group.process_group)
    # Joined in memory too, or every layer that reads it would make a copy of its own.
    return full.movedim(0, dim).contiguous()


def reduce_scatter(full: Tensor, group: Group, *, dim: int, label: str = "") -> Tensor:
    """This rank's slice along `dim` of the sum over the group: [..., n P, ...] -> [..., n, ...].

    Raises ValueError when the dimension is not divisible by the group's size.
    """
    if group.size == 1:
        return full
    if full.shape[dim] % group.size:
        raise ValueError(
            f"dimension {dim} of size {full.shape[dim]} is not divisible by {group.name} size {group.size}"
        )
    leading = full.movedim(dim, 0).contiguous()
    shard = leading.new_empty((leading.shape[0] // group.size, *leading.shape[1:]))
    group.traffic.record("reduce_scatter", group.name, group.size, leading.nbytes, label)
    with group.traffic.communicating(group.name):
        _reduce_scatter(shard, leading, group=group.process_group)
    return shard.movedim(0, dim)


def broadcast(tensor: Tensor, group: Group, *, label: str = "") -> Tensor:
    """The tensor of the group's first rank, written into `tensor` on the others; `tensor` is returned."""
    if group.size == 1:
        return tensor
    group.traffic.record("broadcast", group.name, group.size, tensor.nbytes, label)
    with group.traffic.communicating(group.name):
        dist.broadcast(tensor, group.ranks[0], group=group.process_group)
    return tensor


def gather_objects(value: Any, group: Group) -> list[Any]:
    """Small Python objects of all ranks, in rank order (control traffic: not counted)."""
    if group.size == 1:
        return [value]
    values: list[Any] = [None] * group.size
    dist.all_gather_object(values, value, group=group.process_group)
    return values


class _ReduceInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Group, label: str) -> Tensor:
        ctx.group, ctx.label = group, label
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        # A clone, since autograd may hand the same gradient to others.
        return all_reduce(grad.clone(), ctx.group, label=ctx.label), None, None


class _ReduceInForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Group, label: str) -> Tensor:
        return all_reduce(tensor.clone(), group, label=label)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad, None, None


class _GatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, shard: Tensor, group: Group, label: str) -> Tensor:
        ctx.group, ctx.label = group, label
        return all_gather(shard, group, dim=1, label=label)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return reduce_scatter(grad, ctx.group, dim=1, label=ctx.label), None, None


class _ScatterSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, full: Tensor, group: Group, label: str) -> Tensor:
        ctx.group, ctx.label = group, label
        return reduce_scatter(full, group, dim=1, label=label)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return all_gather(grad, ctx.group, dim=1, label=ctx.label), None, None


def reduce_gradient(parameter: Tensor, group: Group, label: str = "") -> Tensor:
    """The parameter, whose gradient will be summed over the group.

    For parameters that every rank of the group holds but applies to its own part of the work: norms
    and biases under sequence parallelism, QK norms under tensor parallelism.
    """
    return parameter if group.size == 1 else _ReduceInBackward.apply(parameter, group, label)


def enter_tensor_parallel(x_BSE: Tensor, tp: Group, *, sequence_parallel: bool, label: str = "") -> Tensor:
    """Input of column-parallel layers: whole sequence, replicated over the tensor-parallel ranks.

    Without sequence parallelism the input [B, S, E] is whole already and its gradient is all-reduced;
    with it the shards [B, S/tp, E] are gathered and the gradient is reduce-scattered
    (Megatron's f and g; Korthikanti et al. 2022, figure 5). Called once for all the layers that share
    the input, so that the gradient is reduced once.
    """
    if tp.size == 1:
        return x_BSE
    function = _GatherSequence if sequence_parallel else _ReduceInBackward
    return function.apply(x_BSE, tp, label)


def leave_tensor_parallel(partial_BSE: Tensor, tp: Group, *, sequence_parallel: bool, label: str = "") -> Tensor:
    """Sum of row-parallel layers' partial outputs: [B, S, E], or this rank's [B, S/tp, E] of it."""
    if tp.size == 1:
        return partial_BSE
    function = _ScatterSequence if sequence_parallel else _ReduceInForward
    return function.apply(partial_BSE, tp, label)
