"""The learning rate: closed forms at the corners, and its shape."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest

from megazebra.config import OptimizerConfig, ScheduleConfig
from megazebra.train.schedule import learning_rate

LR = 0.25  # exact in binary, so corners are compared exactly


def _rates(total: int, **schedule: Any) -> list[float]:
    config = ScheduleConfig.model_validate(schedule)
    return [learning_rate(step, total, OptimizerConfig(lr=LR), config) for step in range(total)]


@pytest.mark.parametrize("kind", ["constant", "cosine", "linear", "wsd"])
def test_warmup_reaches_the_rate_in_its_last_step(kind: str) -> None:
    rates = _rates(100, kind=kind, warmup_steps=8)
    assert rates[:8] == [LR * (step + 1) / 8 for step in range(8)]
    assert rates[7] == max(rates) == LR


@pytest.mark.parametrize("kind", ["constant", "wsd"])
def test_without_warmup_the_first_step_has_the_full_rate(kind: str) -> None:
    assert _rates(100, kind=kind)[0] == LR


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd"])
@pytest.mark.parametrize("ratio", [0.0, 0.125, 1.0])
@pytest.mark.parametrize("warmup", [0, 10])
def test_the_last_update_gets_the_minimum_and_the_rate_never_rises_after_warmup(
    kind: str, ratio: float, warmup: int
) -> None:
    rates = _rates(101, kind=kind, warmup_steps=warmup, min_lr_ratio=ratio)
    assert rates[-1] == LR * ratio
    after_warmup = rates[max(0, warmup - 1) :]
    assert all(later <= earlier for earlier, later in pairwise(after_warmup))
    assert all(later > earlier for earlier, later in pairwise(rates[:warmup]))


def test_constant() -> None:
    assert _rates(20, kind="constant", warmup_steps=2, min_lr_ratio=0.0)[2:] == [LR] * 18


def test_linear_is_straight() -> None:
    rates = _rates(22, kind="linear", warmup_steps=2, min_lr_ratio=0.0)
    assert rates[1:] == pytest.approx([LR * (20 - i) / 20 for i in range(21)], rel=1e-14, abs=1e-16)


def test_cosine_at_its_corners() -> None:
    rates = _rates(124, kind="cosine", warmup_steps=4, min_lr_ratio=0.1)
    low = LR * 0.1
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):  # of the 120 updates after warmup's last
        expected = low + (LR - low) * (1 + math.cos(math.pi * share)) / 2
        assert rates[3 + round(120 * share)] == pytest.approx(expected, rel=1e-14)


def test_wsd_is_stable_then_decays_linearly() -> None:
    rates = _rates(100, kind="wsd", warmup_steps=10, decay_steps=20, min_lr_ratio=0.0)
    assert rates[9:80] == [LR] * 71
    assert rates[79:] == pytest.approx([LR * (20 - i) / 20 for i in range(21)], rel=1e-14, abs=1e-16)


def test_wsd_decays_over_the_last_tenth_by_default() -> None:
    assert _rates(200, kind="wsd", warmup_steps=10) == _rates(200, kind="wsd", warmup_steps=10, decay_steps=20)


def test_a_decay_of_one_step_is_a_decay() -> None:
    assert _rates(10, kind="wsd", decay_steps=1, min_lr_ratio=0.0) == [LR] * 9 + [0.0]


def test_wsd_decay_never_reaches_into_warmup() -> None:
    rates = _rates(20, kind="wsd", warmup_steps=10, decay_steps=20, min_lr_ratio=0.0)
    assert rates[:10] == [LR * (step + 1) / 10 for step in range(10)]
    assert rates[-1] == 0


@pytest.mark.parametrize("kind", ["constant", "cosine", "linear", "wsd"])
@pytest.mark.parametrize(("total", "warmup"), [(1, 0), (1, 1), (2, 1), (5, 5), (5, 9)])
def test_short_runs_have_a_rate_for_every_step(kind: str, total: int, warmup: int) -> None:
    rates = _rates(total, kind=kind, warmup_steps=warmup)
    assert len(rates) == total
    assert all(0 < rate <= LR for rate in rates)


def test_beyond_the_end_the_minimum_stays() -> None:
    for kind in ("cosine", "linear", "wsd"):
        schedule = ScheduleConfig.model_validate({"kind": kind, "min_lr_ratio": 0.125})
        assert learning_rate(500, 100, OptimizerConfig(lr=LR), schedule) == LR * 0.125
