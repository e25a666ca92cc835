"""What a layer received, kept for the forward pass that recomputes it: that one does not send again."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


class Replay:
    """One layer's receipts of one forward pass, in order; a second pass takes them, and lets them go."""

    def __init__(self) -> None:
        self._receipts: list[object] = []
        self._passes = 0

    def begin(self) -> None:
        """A pass through the layer begins: the first one receives, the next one takes what that received."""
        self._passes += 1

    @property
    def replaying(self) -> bool:
        return self._passes > 1

    def receive(self, exchange: Callable[[], T]) -> T:
        """What `exchange` returns, or returned at this place in the first pass."""
        if self.replaying:
            assert self._receipts, "a graph that is recomputed has one backward"
            return self._receipts.pop(0)  # type: ignore[return-value]
        receipt = exchange()
        self._receipts.append(receipt)
        return receipt


def kept(replay: Replay | None, exchange: Callable[[], T]) -> T:
    """The same where nothing is kept without recomputation."""
    return exchange() if replay is None else replay.receive(exchange)
