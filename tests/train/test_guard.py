"""Which updates are refused, and when the run gives up."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from megazebra.config import GuardConfig
from megazebra.train.guard import SpikeGuard, TrainingDivergedError

HISTORY = 32
# Mean 2 and deviation 1 of the losses, mean 20 and deviation 10 of the gradient norms.
LOSSES = [1.0, 3.0] * (HISTORY // 2)


def _guard(accepted: int = HISTORY, **changes: Any) -> SpikeGuard:
    guard = SpikeGuard(GuardConfig.model_validate({"history": HISTORY, "sigma": 6.0} | changes))
    for loss in LOSSES[:accepted]:
        guard.accepted(loss, 10 * loss)
    return guard


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("accepted", [0, HISTORY])
def test_numbers_that_are_not_finite_are_refused_from_the_first_step(value: float, accepted: int) -> None:
    guard = _guard(accepted)
    assert guard.objection(value, 20.0) == f"loss is {value}"
    assert guard.objection(2.0, value) == f"gradient norm is {value}"


def test_a_spike_is_more_than_sigma_deviations_above_the_mean() -> None:
    guard = _guard()
    assert guard.objection(2.0 + 6.0, 20.0) is None
    assert guard.objection(2.0, 20.0 + 60.0) is None
    message = guard.objection(2.0 + 6.0 + 1e-9, 20.0)
    assert message is not None
    assert message.startswith("loss 8 is a spike (limit 8: mean 2, deviation 1)")
    message = guard.objection(2.0, 80.1)
    assert message is not None
    assert message.startswith("gradient norm 80.1 is a spike (limit 80: mean 20")
    assert guard.objection(-1e9, 0.0) is None, "a low loss is no spike"
    assert _guard(sigma=1.0).objection(3.5, 20.0) is not None


def test_spikes_are_looked_for_once_half_of_the_history_is_there() -> None:
    assert _guard(HISTORY // 2 - 1).objection(1e9, 1e9) is None
    assert _guard(HISTORY // 2).objection(1e9, 20.0) is not None


def test_a_run_that_repeats_itself_may_still_round() -> None:
    guard = SpikeGuard(GuardConfig(history=16))
    for _ in range(16):
        guard.accepted(2.0, 1.0)
    assert guard.objection(2.0 + 1e-6, 1.0) is None
    assert guard.objection(2.1, 1.0) is not None


def test_objection_changes_nothing() -> None:
    guard = _guard()
    before = guard.state_dict()
    for _ in range(10):
        guard.objection(math.nan, 1.0)
        guard.objection(100.0, 1.0)
    assert guard.state_dict() == before


def test_only_recent_accepted_steps_count() -> None:
    guard = _guard()
    for _ in range(HISTORY):
        guard.accepted(100.0, 20.0)
    assert guard.losses == guard.losses.__class__([100.0] * HISTORY)
    assert guard.objection(100.0, 20.0) is None


def test_a_guard_that_is_off_accepts_everything_and_ends_nothing() -> None:
    guard = _guard(enabled=False, max_consecutive_skips=1)
    assert guard.objection(math.nan, math.inf) is None
    before = list(guard.losses)
    guard.accepted(math.nan, 1.0)
    assert list(guard.losses) == before, "a history with NaN would blind the guard for good"
    guard.skipped()
    guard.check("gradient norm is inf, which ZeRO refuses", "samples 0-7")


def test_gives_up_after_so_many_skips_in_a_row() -> None:
    guard = _guard(max_consecutive_skips=3)
    guard.skipped()
    guard.skipped()
    guard.accepted(2.0, 20.0)
    assert (guard.skips_in_a_row, guard.total_skips) == (0, 2)
    guard.skipped()
    guard.skipped()
    guard.check("loss is nan", "samples 32-39")
    guard.skipped()
    with pytest.raises(TrainingDivergedError) as raised:
        guard.check("loss 99 is a spike", "samples 40-47")
    message = str(raised.value)
    for part in ("3 updates in a row", "loss 99 is a spike", "samples 40-47", "train.guard.max_consecutive_skips"):
        assert part in message
    assert guard.total_skips == 5


def test_state_round_trip() -> None:
    guard = _guard(accepted=HISTORY, max_consecutive_skips=3)
    guard.skipped()
    guard.skipped()
    state = json.loads(json.dumps(guard.state_dict()))  # it is kept in a JSON file
    resumed = _guard(accepted=0, max_consecutive_skips=3)
    resumed.load_state_dict(state)
    assert resumed.state_dict() == guard.state_dict()
    for loss, norm in [(8.0, 20.0), (8.1, 20.0), (2.0, 81.0), (math.nan, 1.0)]:
        assert resumed.objection(loss, norm) == guard.objection(loss, norm)
    resumed.skipped()
    with pytest.raises(TrainingDivergedError, match="3 updates in a row"):
        resumed.check("loss is nan", "samples 16-23")


def test_state_of_a_longer_history_keeps_the_recent_part() -> None:
    guard = _guard()
    shorter = _guard(accepted=0, history=16)
    shorter.load_state_dict(guard.state_dict())
    assert list(shorter.losses) == LOSSES[-16:]
