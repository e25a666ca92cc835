"""Local layers: a rank fetches the window - 1 keys to the left of its own, and nothing else.

The keys travel while the queries that don't need them are computed; in backward, the gradients of those that came from
the left travel back while the gradients of the others are computed. A gradient travels in the dtype in which the
kernel gives it, so nothing is lost; sums are made in float32, in a fixed order.

Legend: B batch, n queries and keys of this rank, H query heads, G key/value heads, D head dim, h keys of the halo,
m queries that read it (the first ones).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megazebra.attention.backend import BackendChoice
from megazebra.attention.packing import Packing
from megazebra.context.replay import Replay, kept
from megazebra.parallel.mesh import Group
from megazebra.parallel.messages import Flight, Message
from megazebra.pattern import AttentionSpec


@dataclass(frozen=True)
class Halo:
    """Who sends what to whom: laid out on the host, once per batch and window.

    borrowed: (rank, keys) from the leftmost on: the last keys of those ranks, which make this rank's halo.
    lent: (rank, keys) from the nearest on: how many of this rank's last keys those ranks read.
    readers: m, queries of this rank that read the halo. head, rest: packings of these and of the other queries.
    """

    borrowed: tuple[tuple[int, int], ...]
    lent: tuple[tuple[int, int], ...]
    readers: int
    head: Packing | None
    rest: Packing | None

    @property
    def keys(self) -> int:
        return sum(keys for _, keys in self.borrowed)


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

    Keys and values want gradients on all ranks or on none, and backward runs through them where they do: gradients
    travel whether a rank needs them or not. For backward the output is held twice, in parts and joined.
    """
    assert spec.window is not None, "a global layer has no halo"
    n = q_BSHD.shape[1]
    halo = plan_halo(packing, spec.window, n, group.rank, group.size)
    trip = _Trip(halo, group, label, replay, k_BSGD)
    k_BSGD, v_BSGD, sinks_H = _Lend.apply(k_BSGD, v_BSGD, sinks_H, trip)
    trip.returns = k_BSGD.requires_grad
    trip.send_keys(k_BSGD.detach(), v_BSGD.detach())
    q_head, q_rest = q_BSHD.split([halo.readers, n - halo.readers], dim=1)
    outs = []
    if halo.readers < n:
        outs = [backend.attend(q_rest, k_BSGD, v_BSGD, spec=spec, packing=halo.rest, sinks_H=sinks_H)]
    if halo.readers:
        # After the others: autograd runs backward in the opposite order, so that the halo's gradients leave first.
        k_head, v_head = _Borrow.apply(k_BSGD, v_BSGD, trip)
        outs.insert(0, backend.attend(q_head, k_head, v_head, spec=spec, packing=halo.head, sinks_H=sinks_H))
    trip.end()
    return _Join.apply(trip, *outs)


def plan_halo(packing: Packing | None, window: int, n: int, rank: int, ranks: int) -> Halo:
    if packing is None:
        return _plan(None, window, n, rank, ranks)
    key = ("halo", window, n, rank, ranks)
    if key not in packing.derived:
        packing.derived[key] = _plan(packing, window, n, rank, ranks)
    return packing.derived[key]


def _plan(packing: Packing | None, window: int, n: int, rank: int, ranks: int) -> Halo:
    reaches = [_reach(packing, window, n, other) for other in range(ranks)]
    start, keys = rank * n, reaches[rank]
    # Of the rank d to the left, a rank reads what the ranks between leave over of its reach.
    borrowed = [(rank - d, min(n, keys - (d - 1) * n)) for d in range(rank, 0, -1) if keys > (d - 1) * n]
    lent = [(rank + d, min(n, reaches[rank + d] - (d - 1) * n)) for d in range(1, ranks - rank)]
    lent = [(peer, count) for peer, count in lent if count > 0]
    readers = min(window - 1, n) if keys else 0
    head = rest = None
    if packing is not None:
        if readers:  # those after the document's end don't
            readers = int((packing.host_start_BS[:, start : start + readers] < start).sum(axis=1).max())
            head = packing.part(start, start + readers, start - keys)
        rest = packing.part(start + readers, start + n, start) if readers < n else None
    return Halo(tuple(borrowed), tuple(lent), readers, head, rest)


def _reach(packing: Packing | None, window: int, n: int, rank: int) -> int:
    """How many keys to the left of its own a rank reads, in the row that reads most."""
    keys = min(window - 1, rank * n)
    if packing is None or keys == 0:
        return keys
    return min(keys, rank * n - int(packing.host_start_BS[:, rank * n].min()))


class _Trip:
    """The keys' way to the right and their gradients' way back, for one forward pass of a layer."""

    def __init__(self, halo: Halo, group: Group, label: str, replay: Replay | None, k_BSGD: Tensor) -> None:
        self.halo, self.group, self.label, self.replay = halo, group, label, replay
        # No tensor of the layer is kept: under recomputation it should be gone until backward.
        self._B, _, self._G, self._D = k_BSGD.shape
        self._like = k_BSGD.new_empty(0)
        self._flight: Flight | None = None
        self._buffers: list[Tensor] = []
        self.returns = False  # whether gradients travel back
        self.head_gradients: tuple[Tensor, Tensor] | None = None  # of this rank's own keys, from the readers

    def send_keys(self, k: Tensor, v: Tensor) -> None:
        if self.replay is not None and self.replay.replaying:
            return
        sends = [(peer, torch.stack([k[:, -keys:], v[:, -keys:]])) for peer, keys in self.halo.lent]
        self._fly(sends, self.halo.borrowed)

    def take_keys(self) -> list[Tensor]:
        """[2, B, keys, G, D] from every rank to the left, leftmost first."""
        return kept(self.replay, self._arrived)

    def end(self) -> None:
        """Of forward: what this rank has sent is there."""
        if self._flight is not None:
            self._arrived()

    def send_gradients(self, dk_halo: Tensor, dv_halo: Tensor) -> None:
        counts = [keys for _, keys in self.halo.borrowed]
        parts = zip(self.halo.borrowed, dk_halo.split(counts, dim=1), dv_halo.split(counts, dim=1), strict=True)
        self._fly([(peer, torch.stack([dk, dv])) for (peer, _), dk, dv in parts], self.halo.lent)

    def expect_gradients(self) -> None:
        """On a rank that has none to send."""
        self._fly([], self.halo.lent)

    def take_gradients(self) -> list[Tensor]:
        """[2, B, keys, G, D] of this rank's last keys, from every rank to the right, nearest first."""
        return self._arrived()

    def _fly(self, sends: Sequence[Message], senders: Sequence[tuple[int, int]]) -> None:
        self._buffers = [self._like.new_empty((2, self._B, keys, self._G, self._D)) for _, keys in senders]
        receives = [(peer, buffer) for (peer, _), buffer in zip(senders, self._buffers, strict=True)]
        self._flight = Flight(sends, receives, self.group, self.label)

    def _arrived(self) -> list[Tensor]:
        assert self._flight is not None
        self._flight.wait()
        buffers, self._buffers, self._flight = self._buffers, [], None
        return buffers


class _Lend(torch.autograd.Function):
    """Keys and values as they are; in backward, the sum of all gradients of them, wherever they were read.

    The sinks pass through only to get their gradient after the messages: hooks of ZeRO's reduce the gradient of a
    parameter at once, and all ranks must send and reduce in one order.
    """

    @staticmethod
    def forward(
        ctx: Any, k_BSGD: Tensor, v_BSGD: Tensor, sinks_H: Tensor | None, trip: _Trip
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        ctx.trip = trip
        sinks_H = None if sinks_H is None else sinks_H.view_as(sinks_H)
        return k_BSGD.view_as(k_BSGD), v_BSGD.view_as(v_BSGD), sinks_H

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dk: Tensor, dv: Tensor, dsinks: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None, None]:
        trip: _Trip = ctx.trip
        parts = [] if trip.head_gradients is None else [(slice(0, trip.halo.readers), trip.head_gradients)]
        parts += [(slice(-part.shape[2], None), tuple(part)) for part in trip.take_gradients()]
        trip.head_gradients = None
        return (
            _sum(dk, [(rows, part[0]) for rows, part in parts]),
            _sum(dv, [(rows, part[1]) for rows, part in parts]),
            dsinks,
            None,
        )


def _sum(whole: Tensor, parts: Sequence[tuple[slice, Tensor]]) -> Tensor:
    """The gradient with those of some rows added, in this order, in float32 (or the wider dtype of the tensors)."""
    if not parts:
        return whole
    total = whole.to(torch.promote_types(whole.dtype, torch.float32), copy=True)
    for rows, part in parts:
        total[:, rows] += part
    return total.to(whole.dtype)


class _Borrow(torch.autograd.Function):
    """Keys and values that the first m queries read: the halo, and the first m of this rank's own."""

    @staticmethod
    def forward(ctx: Any, k_BSGD: Tensor, v_BSGD: Tensor, trip: _Trip) -> tuple[Tensor, Tensor]:
        ctx.trip = trip
        halo, m = trip.take_keys(), trip.halo.readers
        k_head = torch.cat([*(part[0] for part in halo), k_BSGD[:, :m]], dim=1)
        v_head = torch.cat([*(part[1] for part in halo), v_BSGD[:, :m]], dim=1)
        return k_head, v_head

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dk_head: Tensor, dv_head: Tensor) -> tuple[None, None, None]:
        trip: _Trip = ctx.trip
        counts = [trip.halo.keys, trip.halo.readers]
        (dk_halo, dk_own), (dv_halo, dv_own) = dk_head.split(counts, dim=1), dv_head.split(counts, dim=1)
        trip.send_gradients(dk_halo, dv_halo)
        # `_Lend` adds these: a gradient returned from here would have to be as large as all keys.
        trip.head_gradients = dk_own, dv_own
        return None, None, None


class _Join(torch.autograd.Function):
    """Outputs side by side; its backward comes first, where a rank that sends no gradients starts to receive."""

    @staticmethod
    def forward(ctx: Any, trip: _Trip, *outs: Tensor) -> Tensor:
        ctx.trip, ctx.lengths = trip, [out.shape[1] for out in outs]
        return outs[0].view_as(outs[0]) if len(outs) == 1 else torch.cat(outs, dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        trip: _Trip = ctx.trip
        if trip.returns and not trip.halo.readers:
            trip.expect_gradients()
        return None, *dout.split(ctx.lengths, dim=1)
