"""Whole sequences of some heads in place of parts of the sequence of all heads (Jacobs et al. 2023).

An all-to-all brings every rank the queries, keys and values of its heads for the whole sequence, another one brings
the outputs back: global layers are balanced by themselves. Key/value heads go to every rank that has queries for them;
their gradients from several ranks are summed in float32, in the order of ranks.

Legend: B batch, n tokens of this rank, S of the whole sequence, P ranks, H query heads and G key/value heads of this
tensor-parallel rank, h heads of this rank of P, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megazebra.attention.backend import BackendChoice
from megazebra.attention.packing import Packing
from megazebra.context.heads import HeadSplit
from megazebra.context.replay import Replay, kept
from megazebra.parallel.mesh import Group
from megazebra.parallel.messages import all_to_all
from megazebra.pattern import AttentionSpec


def attend(
    q_BSHD: Tensor,
    k_BSGD: Tensor,
    v_BSGD: Tensor,
    *,
    spec: AttentionSpec,
    packing: Packing | None,
    backend: BackendChoice,
    group: Group,
    sinks_H: Tensor | None = None,
    label: str = "",
    replay: Replay | None = None,
) -> Tensor:
    """Output [B, n, H, D] of this rank's queries; `packing` is that of the whole sequences.

    Raises ValueError when the heads don't divide by the ranks.
    """
    heads = HeadSplit.of(q_BSHD.shape[2], k_BSGD.shape[2], group.size)
    swap = _Swap(group, label, replay)
    q_BShD, k_BSgD, v_BSgD = _ToHeads.apply(q_BSHD, k_BSGD, v_BSGD, heads, swap)
    slots = heads.slots(group.rank)
    if slots != list(range(len(slots))):  # groups of queries that kernels could not tell apart
        k_BSgD, v_BSgD = (torch.cat([x[:, :, slot : slot + 1] for slot in slots], dim=2) for x in (k_BSgD, v_BSgD))
    if sinks_H is not None:
        sinks_H = sinks_H.split(heads.heads_per_rank)[group.rank]
    out_BShD = backend.attend(q_BShD, k_BSgD, v_BSgD, spec=spec, packing=packing, sinks_H=sinks_H)
    return _ToSequence.apply(out_BShD, swap)


class _Swap:
    """The two directions of the all-to-all. Each tensor is copied once, into the order in which it is sent."""

    def __init__(self, group: Group, label: str, replay: Replay | None) -> None:
        self.group, self.label, self.replay = group, label, replay

    def to_heads(self, parts: Sequence[Sequence[Tensor]]) -> Tensor:
        """For every rank p, tensors [B, n, some heads, D] that go there side by side -> [B, S, h, D] on this rank."""
        B, n, _, D = parts[0][0].shape
        heads = [sum(part.shape[2] for part in of_rank) for of_rank in parts]
        sent = [B * n * count * D for count in heads]
        outgoing = parts[0][0].new_empty(sum(sent))
        for block, count, of_rank in zip(outgoing.split(sent), heads, parts, strict=True):
            torch.cat(list(of_rank), dim=2, out=block.view(B, n, count, D))
        mine = heads[self.group.rank]
        arriving = [B * n * mine * D] * self.group.size
        incoming = all_to_all(outgoing, sent, arriving, self.group, label=self.label)
        return incoming.view(self.group.size, B, n, mine, D).movedim(0, 1).flatten(1, 2)

    def to_sequence(self, parts: Sequence[Tensor], heads: Sequence[int]) -> list[Tensor]:
        """Tensors [B, S, some heads, D], side by side -> [B, n, heads[p], D] from every rank p."""
        B, S, _, D = parts[0].shape
        ranks, mine = self.group.size, sum(part.shape[2] for part in parts)
        n = S // ranks
        outgoing = parts[0].new_empty((ranks, B, n, mine, D))
        for to, block in enumerate(outgoing):
            torch.cat([part[:, to * n : (to + 1) * n] for part in parts], dim=2, out=block)
        arriving = [B * n * count * D for count in heads]
        incoming = all_to_all(outgoing.flatten(), [block.numel() for block in outgoing], arriving, self.group,
                              label=self.label)  # fmt: skip
        return [part.view(B, n, -1, D) for part in incoming.split(arriving)]


class _ToHeads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q_BSHD: Tensor, k_BSGD: Tensor, v_BSGD: Tensor, heads: HeadSplit, swap: _Swap
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.heads, ctx.swap, ctx.kv_heads = heads, swap, k_BSGD.shape[2]

        def exchange() -> Tensor:
            own = (heads.kv_heads(rank) for rank in range(heads.ranks))
            return swap.to_heads(
                [(q, k_BSGD[:, :, g.start : g.stop], v_BSGD[:, :, g.start : g.stop])
                 for q, g in zip(q_BSHD.split(heads.heads_per_rank, dim=2), own, strict=True)]
            )  # fmt: skip

        return kept(swap.replay, exchange).split(_counts(heads, swap.group.rank), dim=2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        heads: HeadSplit = ctx.heads
        sizes = [_counts(heads, rank) for rank in range(heads.ranks)]
        blocks = ctx.swap.to_sequence(gradients, [sum(size) for size in sizes])
        parts = [block.split(size, dim=2) for block, size in zip(blocks, sizes, strict=True)]
        dq_BSHD = torch.cat([dq for dq, _, _ in parts], dim=2)
        B, n, _, D = dq_BSHD.shape
        sums = dq_BSHD.new_zeros((2, B, n, ctx.kv_heads, D), dtype=torch.promote_types(dq_BSHD.dtype, torch.float32))
        for rank, (_, dk, dv) in enumerate(parts):
            own = heads.kv_heads(rank)
            sums[0, :, :, own.start : own.stop] += dk
            sums[1, :, :, own.start : own.stop] += dv
        return dq_BSHD, *sums.to(dq_BSHD.dtype), None, None


class _ToSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out_BShD: Tensor, swap: _Swap) -> Tensor:
        ctx.swap = swap
        counts = [out_BShD.shape[2]] * swap.group.size
        out_BSHD = kept(swap.replay, lambda: torch.cat(swap.to_sequence([out_BShD], counts), dim=2))
        # A tensor of its own: the one that is kept must not become part of the graph that keeps it.
        return out_BSHD.view_as(out_BSHD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_BSHD: Tensor) -> tuple[Tensor, None]:
        swap: _Swap = ctx.swap
        return swap.to_heads([(part,) for part in dout_BSHD.chunk(swap.group.size, dim=2)]), None


def _counts(heads: HeadSplit, rank: int) -> list[int]:
    """Heads of q, k and v on a rank."""
    own = len(heads.kv_heads(rank))
    return [heads.heads_per_rank, own, own]
