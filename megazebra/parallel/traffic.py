"""Counts of what every collective moved, by group, kind and label."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass


@dataclass
class Tally:
    calls: int = 0
    bytes: int = 0


class TrafficCounter:
    """Calls and bytes of one rank's collectives.

    Bytes are those a bandwidth-optimal (ring) algorithm makes each rank receive, so they can be compared
    with formulas and across backends. With P ranks and a full tensor of n bytes: all-gather and
    reduce-scatter n (P-1)/P, all-reduce 2 n (P-1)/P, broadcast n.
    """

    def __init__(self) -> None:
        self.tallies: dict[tuple[str, str, str], Tally] = defaultdict(Tally)

    def record(self, kind: str, group_name: str, group_size: int, full_bytes: int, label: str = "") -> None:
        """Count one collective of `kind` over a full (unsharded) tensor of `full_bytes`."""
        tally = self.tallies[group_name, kind, label]
        tally.calls += 1
        if kind == "broadcast":
            tally.bytes += full_bytes
        else:
            passes = 2 if kind == "all_reduce" else 1
            tally.bytes += passes * full_bytes * (group_size - 1) // group_size

    @property
    def total_bytes(self) -> int:
        return sum(tally.bytes for tally in self.tallies.values())

    def by_kind(self) -> dict[str, Tally]:
        """Tallies summed over labels, keyed 'group.kind' ('tp.all_reduce')."""
        sums: dict[str, Tally] = defaultdict(Tally)
        for (group_name, kind, _), tally in self.tallies.items():
            entry = sums[f"{group_name}.{kind}"]
            entry.calls += tally.calls
            entry.bytes += tally.bytes
        return dict(sums)

    def reset(self) -> None:
        self.tallies.clear()
