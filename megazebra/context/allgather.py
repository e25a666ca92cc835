"""All keys on every rank, and the queries dealt out anew so that all ranks do about the same work.

For layers that neither a halo nor Ulysses can serve. Keys and values are gathered, their gradients reduce-scattered in
float32; queries travel to the rank that computes them and their outputs back (`context.dealing` says which).

Legend: B batch, n tokens of this rank, S of the whole sequence, H query heads, G key/value heads, D head dim, m queries
that this rank computes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megazebra.attention.backend import BackendChoice
from megazebra.attention.packing import Packing
from megazebra.context.dealing import Deal, deal_queries
from megazebra.context.replay import Replay, received
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
    seq_len = q_BSHD.shape[1] * group.size
    deal, packings = _plan(packing, seq_len, group, spec.window)
    moves = _Moves(deal, group, label, replay)
    k_BSGD, v_BSGD = _Gather.apply(k_BSGD, v_BSGD, moves)
    q_BmHD = _Deal.apply(q_BSHD, moves)
    chunks = deal.chunks[group.rank]
    outs = []
    for (first, end), own_packing, q_chunk in zip(
        chunks, packings, q_BmHD.split([end - first for first, end in chunks], dim=1), strict=True
    ):
        keys = slice(_first_key(packing, spec.window, first), end)
        outs.append(
            backend.attend(q_chunk, k_BSGD[:, keys], v_BSGD[:, keys], spec=spec, packing=own_packing, sinks_H=sinks_H)
        )
    return _Return.apply(torch.cat(outs, dim=1), moves)


def _plan(packing: Packing | None, seq_len: int, group: Group, window: int | None) -> tuple[Deal, list[Packing | None]]:
    if packing is None:
        deal = deal_queries(None, seq_len, group.size, window)
        return deal, [None] * len(deal.chunks[group.rank])
    key = ("allgather", window, group.rank, group.size)
    if key not in packing.derived:
        deal = deal_queries(packing.host_start_BS, seq_len, group.size, window)
        chunks = deal.chunks[group.rank]
        packing.derived[key] = (
            deal,
            [packing.part(first, end, _first_key(packing, window, first)) for first, end in chunks],
        )
    return packing.derived[key]


def _first_key(packing: Packing | None, window: int | None, query: int) -> int:
    """The first key that the query, or any after it, reads in any row."""
    in_window = 0 if window is None else max(0, query - window + 1)
    return in_window if packing is None else max(in_window, int(packing.host_start_BS[:, query].min()))


class _Moves:
    """Rows of queries or outputs, to the ranks that compute them and back."""

    def __init__(self, deal: Deal, group: Group, label: str, replay: Replay | None) -> None:
        self.deal, self.group, self.label, self.replay = deal, group, label, replay
        ranks = range(group.size)
        self.leaving = [deal.between(group.rank, computer) for computer in ranks]
        self.rows_out = [deal.rows(group.rank, computer) for computer in ranks]
        self.rows_in = [deal.rows(holder, group.rank) for holder in ranks]
        self.nothing_moves = all(deal.rows_out(rank) == 0 for rank in ranks)

    def to_computers(self, x_BSHD: Tensor) -> Tensor:
        """[B, n, H, D] -> [B, m, H, D]"""
        if self.nothing_moves:
            return x_BSHD
        parts = [x_BSHD[:, first:end] for chunks in self.leaving for first, end in chunks]
        return torch.cat(self._exchange(torch.cat(parts, dim=1), self.rows_out, self.rows_in), dim=1)

    def to_holders(self, x_BmHD: Tensor) -> Tensor:
        """[B, m, H, D] -> [B, n, H, D]"""
        if self.nothing_moves:
            return x_BmHD
        arrived = self._exchange(x_BmHD, self.rows_in, self.rows_out)
        out_BSHD = x_BmHD.new_empty((x_BmHD.shape[0], sum(self.rows_out), *x_BmHD.shape[2:]))
        for chunks, rows in zip(self.leaving, arrived, strict=True):
            for (first, end), part in zip(
                chunks, rows.split([end - first for first, end in chunks], dim=1), strict=True
            ):
                out_BSHD[:, first:end] = part
        return out_BSHD

    def _exchange(self, x_BmHD: Tensor, rows_out: list[int], rows_in: list[int]) -> tuple[Tensor, ...]:
        """Rows for rank 0, 1, ... side by side -> the rows from rank 0, 1, ..."""
        # Sequence first, so that each rank's rows lie together; for one sequence per rank (B = 1) nothing is copied.
        leading = x_BmHD.transpose(0, 1).contiguous()
        size = leading[0].numel()
        incoming = all_to_all(leading.flatten(), [rows * size for rows in rows_out], [rows * size for rows in rows_in],
                              self.group, label=self.label)  # fmt: skip
        return incoming.view(-1, *leading.shape[1:]).transpose(0, 1).split(rows_in, dim=1)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, k_BSGD: Tensor, v_BSGD: Tensor, moves: _Moves) -> tuple[Tensor, ...]:
        ctx.moves = moves

        def exchange() -> Tensor:
            return all_gather(torch.cat([k_BSGD, v_BSGD], dim=2), moves.group, dim=1, label=moves.label)

        return received(moves.replay, exchange).chunk(2, dim=2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dk_BSGD: Tensor, dv_BSGD: Tensor) -> tuple[Tensor, Tensor, None]:
        moves: _Moves = ctx.moves
        both = torch.cat([dk_BSGD, dv_BSGD], dim=2).to(torch.promote_types(dk_BSGD.dtype, torch.float32))
        both = reduce_scatter(both, moves.group, dim=1, label=moves.label).to(dk_BSGD.dtype)
        return *both.chunk(2, dim=2), None  # type: ignore[return-value]


class _Deal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_BSHD: Tensor, moves: _Moves) -> Tensor:
        ctx.moves = moves
        q_BmHD = received(moves.replay, lambda: moves.to_computers(q_BSHD))
        return q_BmHD.view_as(q_BmHD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq_BmHD: Tensor) -> tuple[Tensor, None]:
        return ctx.moves.to_holders(dq_BmHD), None


class _Return(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out_BmHD: Tensor, moves: _Moves) -> Tensor:
        ctx.moves = moves
        out_BSHD = received(moves.replay, lambda: moves.to_holders(out_BmHD))
        return out_BSHD.view_as(out_BSHD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_BSHD: Tensor) -> tuple[Tensor, None]:
        return ctx.moves.to_computers(dout_BSHD), None
