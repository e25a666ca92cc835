"""Counts of what every collective moved, by group, kind and label."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol


@dataclass
class Tally:
    calls: int = 0
    bytes: int = 0


class Watcher(Protocol):
    """Told what this rank enters and leaves; parts lie within each other or apart."""

    def enter(self, part: str) -> None: ...

    def leave(self, part: str) -> None: ...


class TrafficCounter:
    """Calls and bytes of one rank's collectives. `watchers` learn when they run.

    Bytes are those a bandwidth-optimal (ring) algorithm makes each rank receive, so they can be compared
    with formulas and across backends. With P ranks and a full tensor of n bytes: all-gather and
    reduce-scatter n (P-1)/P, all-reduce 2 n (P-1)/P, broadcast n. All-to-all and messages between two ranks count what
    arrives from others.
    """

    def __init__(self) -> None:
        self.tallies: dict[tuple[str, str, str], Tally] = defaultdict(Tally)
        self.in_flight_s = 0.0
        self.waited_s = 0.0
        self.watchers: list[Watcher] = []

    @contextmanager
    def communicating(self, group_name: str) -> Iterator[None]:
        """Around whatever may wait for other ranks of the group."""
        part, watchers = f"communication, {group_name}", tuple(self.watchers)
        for watcher in watchers:
            watcher.enter(part)
        try:
            yield
        finally:
            for watcher in reversed(watchers):
                watcher.leave(part)

    def record(self, kind: str, group_name: str, group_size: int, full_bytes: int, label: str = "") -> None:
        """Count one collective of `kind` over a full (unsharded) tensor of `full_bytes`."""
        if kind == "broadcast":
            received = full_bytes
        else:
            passes = 2 if kind == "all_reduce" else 1
            received = passes * full_bytes * (group_size - 1) // group_size
        self.record_received(kind, group_name, received, label)

    def record_received(self, kind: str, group_name: str, received_bytes: int, label: str = "") -> None:
        """Count one collective whose ranks receive different amounts."""
        tally = self.tallies[group_name, kind, label]
        tally.calls += 1
        tally.bytes += received_bytes

    def record_flight(self, in_flight_s: float, waited_s: float) -> None:
        """Time a message was under way beside computation, and how much of it this rank stood waiting for it."""
        self.in_flight_s += in_flight_s
        self.waited_s += waited_s

    @property
    def overlap(self) -> float | None:
        """Share of the messages' time under way in which this rank computed; None where nothing was measured."""
        return overlap_share(self.in_flight_s, self.waited_s)

    @property
    def total_bytes(self) -> int:
        return sum(tally.bytes for tally in self.tallies.values())

    def by_kind(self) -> dict[str, Tally]:
        """Tallies summed over labels, keyed 'group.kind' ('tp.all_reduce')."""
        return _summed((f"{group_name}.{kind}", tally) for (group_name, kind, _), tally in self.tallies.items())

    def context(self) -> dict[str, Tally]:
        """Tallies of context parallelism by kind of layer and strategy, the end of its labels: 'local.halo'."""
        return _summed(
            (".".join(label.split(".")[-2:]), tally)
            for (group_name, _, label), tally in self.tallies.items()
            if group_name == "cp" and label.startswith("layers.")
        )

    def reset(self) -> None:
        self.tallies.clear()
        self.in_flight_s = self.waited_s = 0.0


def overlap_share(in_flight_s: float, waited_s: float) -> float | None:
    """Share of the time under way that was not spent waiting; None where nothing was under way."""
    return 1 - waited_s / in_flight_s if in_flight_s else None


def _summed(tallies: Iterable[tuple[str, Tally]]) -> dict[str, Tally]:
    """Tallies of one name added up."""
    sums: dict[str, Tally] = defaultdict(Tally)
    for name, tally in tallies:
        sums[name].calls += tally.calls
        sums[name].bytes += tally.bytes
    return dict(sums)
