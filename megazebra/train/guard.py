"""Spikes and NaN: which updates to skip, and when to give up."""

from __future__ import annotations

import math
import statistics
from collections import deque

from megazebra.config.schema import GuardConfig
from megazebra.errors import UserError

# Of the mean: a run that repeats itself must not take rounding for a spike.
_LEAST_DEVIATION = 1e-3


class TrainingDivergedError(UserError):
    """Too many updates in a row were skipped."""


class SpikeGuard:
    """Watches losses and gradient norms, the same numbers on every rank, so that all decide alike.

    An update is refused when either is not finite, or more than `sigma` standard deviations above the mean
    of the last `history` accepted ones (the rule of OLMo-core's SkipStepOptimizer). Losses are judged
    once half of the history is there.
    """

    def __init__(self, config: GuardConfig) -> None:
        self.config = config
        self.losses: deque[float] = deque(maxlen=config.history)
        self.grad_norms: deque[float] = deque(maxlen=config.history)
        self.skips_in_a_row = 0
        self.total_skips = 0

    def objection(self, loss: float, grad_norm: float) -> str | None:
        """Why this update must not be made; None when it may. Changes nothing."""
        if not self.config.enabled:
            return None
        return self._objection("loss", loss, self.losses) or self._objection(
            "gradient norm", grad_norm, self.grad_norms
        )

    def _objection(self, what: str, value: float, history: deque[float]) -> str | None:
        if not math.isfinite(value):
            return f"{what} is {value}"
        if len(history) < self.config.history // 2:
            return None
        mean, deviation = statistics.fmean(history), statistics.pstdev(history)
        deviation = max(deviation, _LEAST_DEVIATION * abs(mean))
        limit = mean + self.config.sigma * deviation
        if value > limit:
            return f"{what} {value:.4g} is a spike (limit {limit:.4g}: mean {mean:.4g}, deviation {deviation:.2g})"
        return None

    def accepted(self, loss: float, grad_norm: float) -> None:
        """Take a step that was made into the history (with the guard off it may be any number)."""
        self.skips_in_a_row = 0
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self.losses.append(loss)
            self.grad_norms.append(grad_norm)

    def skipped(self) -> None:
        """Count an update that was not made."""
        self.skips_in_a_row += 1
        self.total_skips += 1

    def check(self, reason: str, samples: str) -> None:
        """Raises TrainingDivergedError after `max_consecutive_skips` skips in a row, the last for `reason`."""
        if self.config.enabled and self.skips_in_a_row >= self.config.max_consecutive_skips:
            raise TrainingDivergedError(
                f"{self.skips_in_a_row} updates in a row were skipped; last reason: {reason}; last batch: {samples}. "
                "Lower optimizer.lr, look at those samples, or raise train.guard.max_consecutive_skips"
            )

    def state_dict(self) -> dict[str, object]:
        return {
            "losses": list(self.losses),
            "grad_norms": list(self.grad_norms),
            "skips_in_a_row": self.skips_in_a_row,
            "total_skips": self.total_skips,
        }

    def load_state_dict(self, state: dict[str, object]) -> None:
        self.losses = deque(state["losses"], maxlen=self.config.history)  # type: ignore[call-overload]
        self.grad_norms = deque(state["grad_norms"], maxlen=self.config.history)  # type: ignore[call-overload]
        self.skips_in_a_row = int(state["skips_in_a_row"])  # type: ignore[call-overload]
        self.total_skips = int(state["total_skips"])  # type: ignore[call-overload]
