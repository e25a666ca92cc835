"""Ranks that are slower than the others: who it is in a step, and who it is all the time.

Compared is each rank's own work: the time of its step less what it stood in collectives and waited for halos. Its data
counts, since a rank that waits for its data keeps the others waiting. On CPUs that is the host's time; on GPUs the
stream's in collectives, so that what ZeRO sends beside computation is taken off too, on every rank alike.
"""

from __future__ import annotations

import statistics
from collections import deque
from dataclasses import dataclass

# A rank is reported when its own work took more than THRESHOLD times that of the median rank, in the median of the last
# WINDOW steps: neither one slow step nor a rank's share of the work (layers, documents) comes to that.
WINDOW = 20
THRESHOLD = 1.25


@dataclass(frozen=True)
class StepTimes:
    """data_wait_s: how long the slowest rank waited for its batch. work_s: own work of every rank."""

    data_wait_s: float
    work_s: list[float]

    @property
    def median_work_s(self) -> float:
        """The lower of two middle ones: of two ranks, the fast one."""
        return statistics.median_low(self.work_s)

    @property
    def slowest_rank(self) -> int:
        return max(range(len(self.work_s)), key=self.work_s.__getitem__)

    @property
    def spread_s(self) -> float:
        """Own work of the slowest rank above the median: about what a typical rank waits for it."""
        return self.work_s[self.slowest_rank] - self.median_work_s


class Stragglers:
    """Watches step after step; every slow rank is told of once, and again when it had recovered."""

    def __init__(self) -> None:
        self._ratios: deque[list[float]] = deque(maxlen=WINDOW)
        self._known: set[int] = set()

    def step(self, times: StepTimes) -> list[str]:
        """A sentence for each rank that has become slower than the others."""
        median = times.median_work_s
        if median <= 0:
            return []
        self._ratios.append([work / median for work in times.work_s])
        if len(self._ratios) < WINDOW:
            return []
        usual = [statistics.median(ratios) for ratios in zip(*self._ratios, strict=True)]
        slow = {rank for rank, ratio in enumerate(usual) if ratio > THRESHOLD}
        new, self._known = sorted(slow - self._known), slow
        return [_sentence(rank, usual[rank]) for rank in new]


def _sentence(rank: int, ratio: float) -> str:
    return (
        f"rank {rank} is slow: in the last {WINDOW} steps its own work took {ratio:.2f} times as long as that of the "
        "median rank, and the others waited for it; run.json says which host it is on"
    )
