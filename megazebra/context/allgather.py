"""All keys on every rank, and the queries dealt out anew so that all ranks do about the same work.

For layers that neither a halo nor Ulysses can serve. Keys and values are gathered, their gradients reduce-scattered in
float32; queries travel to the rank that computes them and their outputs back (`context.dealing` says which).

Legend: B batch, n tokens of this rank, S of the whole sequence, H query heads, G key/value heads, D head dim, m queries
that this rank computes.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megazebra.attention.backend import BackendChoice
from megazebra.attention.packing import Packing
from megazebra.context.dealing import deal_queries
from megazebra.context.replay import Replay, kept
from megazebra.parallel.collectives import all_gather, reduce_scatter
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
    """Output [B, n, H, D] of this rank's queries; `packing` is that of the whole sequences."""
    plan = _plan_of(packing, q_BSHD.shape[1] * group.size, group.rank, group.size, spec.window)
    moves = _Moves(plan, group, label, replay)
    keys_and_values = _Gather.apply(k_BSGD, v_BSGD, moves)
    q_BmHD = q_BSHD if plan.deal.nothing_moves else _Deal.apply(q_BSHD, moves)
    chunks = len(plan.keys)
    outs = [
        backend.attend(q, k, v, spec=spec, packing=part, sinks_H=sinks_H)
        for q, k, v, part in zip(
            q_BmHD.split(plan.queries, dim=1),
            keys_and_values[:chunks],
            keys_and_values[chunks:],
            plan.packings,
            strict=True,
        )
    ]
    out_BmHD = outs[0] if chunks == 1 else torch.cat(outs, dim=1)
    return out_BmHD if plan.deal.nothing_moves else _Return.apply(out_BmHD, moves)


class _Plan:
    """Which queries this rank computes, chunk after chunk, and how they travel: laid out on the host, once per batch.

    queries, keys, packings: of every chunk, the number of its queries, the keys they read, and their documents.
    leaving: for every rank the parts of this one's queries that it computes, as (first, end).
    rows_out, rows_in: for every rank, how many queries go there and come from there.
    """

    def __init__(self, packing: Packing | None, seq_len: int, rank: int, ranks: int, window: int | None) -> None:
        starts_BS = None if packing is None else packing.host_start_BS
        self.deal = deal_queries(starts_BS, seq_len, ranks, window)
        self.queries: list[int] = []
        self.keys: list[slice] = []
        self.packings: list[Packing | None] = []
        for first, end in self.deal.chunks[rank]:
            first_key = 0 if window is None else max(0, first - window + 1)
            if starts_BS is not None:
                first_key = max(first_key, int(starts_BS[:, first].min()))
            self.queries.append(end - first)
            self.keys.append(slice(first_key, end))
            self.packings.append(None if packing is None else packing.part(first, end, first_key))
        self.leaving = [self.deal.between(rank, computer) for computer in range(ranks)]
        self.rows_out = [self.deal.rows(rank, computer) for computer in range(ranks)]
        self.rows_in = [self.deal.rows(holder, rank) for holder in range(ranks)]


def _plan_of(packing: Packing | None, seq_len: int, rank: int, ranks: int, window: int | None) -> _Plan:
    if packing is None:
        return _plan_of_whole(seq_len, rank, ranks, window)
    key = ("allgather", window, rank, ranks)
    if key not in packing.derived:
        packing.derived[key] = _Plan(packing, seq_len, rank, ranks, window)
    return packing.derived[key]


@lru_cache(maxsize=64)
def _plan_of_whole(seq_len: int, rank: int, ranks: int, window: int | None) -> _Plan:
    return _Plan(None, seq_len, rank, ranks, window)


class _Moves:
    """Rows of queries or outputs, to the ranks that compute them and back."""

    def __init__(self, plan: _Plan, group: Group, label: str, replay: Replay | None) -> None:
        self.plan, self.group, self.label, self.replay = plan, group, label, replay

    def to_computers(self, x_BSHD: Tensor) -> Tensor:
        """[B, n, H, D] -> [B, m, H, D]"""
        parts = [x_BSHD[:, first:end] for chunks in self.plan.leaving for first, end in chunks]
        return self._exchange(torch.cat(parts, dim=1), self.plan.rows_out, self.plan.rows_in)

    def to_holders(self, x_BmHD: Tensor) -> Tensor:
        """[B, m, H, D] -> [B, n, H, D]"""
        arrived = self._exchange(x_BmHD, self.plan.rows_in, self.plan.rows_out)
        out_BSHD = torch.empty_like(arrived)
        chunks = [chunk for of_rank in self.plan.leaving for chunk in of_rank]
        for (first, end), part in zip(
            chunks, arrived.split([end - first for first, end in chunks], dim=1), strict=True
        ):
            out_BSHD[:, first:end] = part
        return out_BSHD

    def _exchange(self, x_BmHD: Tensor, rows_out: list[int], rows_in: list[int]) -> Tensor:
        """Rows for rank 0, 1, ... side by side -> the rows from rank 0, 1, ... side by side."""
        # Sequence first, so that each rank's rows lie together; for one sequence per rank (B = 1) nothing is copied.
        leading = x_BmHD.transpose(0, 1).contiguous()
        size = leading[0].numel()
        incoming = all_to_all(
            leading.flatten(),
            [rows * size for rows in rows_out],
            [rows * size for rows in rows_in],
            self.group,
            label=self.label,
        )
        return incoming.view(-1, *leading.shape[1:]).transpose(0, 1)


class _Gather(torch.autograd.Function):
    """The keys that every chunk reads, then the values."""

    @staticmethod
    def forward(ctx: Any, k_BSGD: Tensor, v_BSGD: Tensor, moves: _Moves) -> tuple[Tensor, ...]:
        def exchange() -> Tensor:
            return all_gather(torch.cat([k_BSGD, v_BSGD], dim=2), moves.group, dim=1, label=moves.label)

        both = kept(moves.replay, exchange)
        ctx.moves, ctx.shape = moves, both.shape
        return tuple(x[:, keys] for x in both.chunk(2, dim=2) for keys in moves.plan.keys)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        moves: _Moves = ctx.moves
        dtype = gradients[0].dtype
        both = gradients[0].new_zeros(ctx.shape, dtype=torch.promote_types(dtype, torch.float32))
        dk_BSGD, dv_BSGD = both.chunk(2, dim=2)
        chunks = len(moves.plan.keys)
        for keys, dk, dv in zip(moves.plan.keys, gradients[:chunks], gradients[chunks:], strict=True):
            dk_BSGD[:, keys] += dk
            dv_BSGD[:, keys] += dv
        own = reduce_scatter(both, moves.group, dim=1, label=moves.label).to(dtype)
        return *own.chunk(2, dim=2), None  # type: ignore[return-value]


class _Deal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_BSHD: Tensor, moves: _Moves) -> Tensor:
        ctx.moves = moves
        q_BmHD = kept(moves.replay, lambda: moves.to_computers(q_BSHD))
        # A tensor of its own: the one that is kept must not become part of the graph that keeps it.
        return q_BmHD.view_as(q_BmHD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq_BmHD: Tensor) -> tuple[Tensor, None]:
        return ctx.moves.to_holders(dq_BmHD), None


class _Return(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out_BmHD: Tensor, moves: _Moves) -> Tensor:
        ctx.moves = moves
        out_BSHD = kept(moves.replay, lambda: moves.to_holders(out_BmHD))
        return out_BSHD.view_as(out_BSHD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_BSHD: Tensor) -> tuple[Tensor, None]:
        return ctx.moves.to_computers(dout_BSHD), None
