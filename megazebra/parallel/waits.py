"""How long this rank stands in collectives: what is left of a step is its own work, by which ranks can be compared.

A step takes every rank equally long, since the fast ones wait in collectives for the slow ones.
"""

from __future__ import annotations

import time
from typing import Protocol

import torch


class Waits(Protocol):
    """Told by `TrafficCounter.communicating` when this rank enters a collective and when it comes out."""

    def enter(self, part: str) -> None: ...

    def leave(self, part: str) -> None: ...

    def reset(self) -> None: ...

    def seconds(self) -> float:
        """Time in collectives since the last reset, transfers included. Ends measuring until the next one.

        Call it when the device has nothing to do.
        """


class HostWaits:
    """CPU: collectives hold the host."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self._sum = self._entered = 0.0

    def enter(self, part: str) -> None:
        self._entered = time.perf_counter()

    def leave(self, part: str) -> None:
        self._sum += time.perf_counter() - self._entered

    def seconds(self) -> float:
        return self._sum


class DeviceWaits:
    """GPU: the stream waits and the host does not, so events in the stream say how long. Never run on a GPU.

    ZeRO's reductions on a stream of their own count too, although computation goes on beside them.
    """

    def __init__(self) -> None:
        self._events: list[torch.cuda.Event] | None = None

    def reset(self) -> None:
        self._events = []

    def enter(self, part: str) -> None:
        if self._events is None:  # nobody asks, as in evaluation and generation: events would pile up
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._events.append(event)

    leave = enter

    def seconds(self) -> float:
        events, self._events = self._events or [], None
        begins, ends = events[::2], events[1::2]
        return sum(begin.elapsed_time(end) for begin, end in zip(begins, ends, strict=True)) / 1e3


def waits_on(device: torch.device | None) -> Waits:
    return DeviceWaits() if device is not None and device.type == "cuda" else HostWaits()
