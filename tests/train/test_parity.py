"""Every layout trains like a plain single-process loop: losses, gradient norms, and parameters at the end.

The yardstick is rounding itself. The plain loop runs in float64 (the truth) and in float32; how far float32
strays from the truth is the noise of this model, this data and these ten steps. A sharded float32 run adds
up in another order, so its distance from the truth may be a few times that noise, never an order more.

The whole matrix: python -m pytest -m "slow or not slow" tests/train/test_parity.py
"""

from __future__ import annotations

import functools

import pytest
import torch
from support.distributed import run_distributed
from support.training import Trajectory, distance, tiny_config, train_plainly, train_under_deepspeed

from megazebra.config.schema import Config

OPTIMIZERS = {"sgd": 0.5, "adamw": 0.01}
STAGES = (0, 1, 2, 3)
Layout = tuple[int, bool, int]  # tp, with sequence parallelism, dp
SLOW_LAYOUTS: list[Layout] = [(2, False, 1), (2, False, 2), (2, True, 1), (4, False, 2), (4, True, 1), (4, True, 2)]
LAYOUTS: list[Layout] = [(1, False, 1), (1, False, 2), (2, True, 2), (4, False, 1)]
# Sums over ranks have other, but not more, roundings; SGD's noise is a few units in the last place, where
# one unit more is already a multiple.
TIMES_THE_NOISE = 6
BF16_SEEDS = (1, 2, 3)


def config_for(optimizer: str, **dotted: object) -> Config:
    return tiny_config(optimizer__name=optimizer, optimizer__lr=OPTIMIZERS[optimizer], **dotted)


@functools.cache
def truth(optimizer: str) -> Trajectory:
    return train_plainly(config_for(optimizer), torch.float64)


@functools.cache
def noise(optimizer: str) -> tuple[float, float, float]:
    return distance(train_plainly(config_for(optimizer)), truth(optimizer))


@functools.cache
def runs_of(layout: Layout) -> dict[tuple[str, int], list[Trajectory]]:
    """All stages and optimizers under one layout, in one start of the ranks; every rank's view."""
    tp, sequence_parallel, dp = layout
    cases = [(optimizer, stage) for optimizer in OPTIMIZERS for stage in STAGES]
    configs = [
        config_for(
            optimizer,
            parallel__tensor=tp,
            parallel__sequence_parallel=sequence_parallel,
            parallel__zero_stage=stage,
            # Two micro-batches on every rank, so that gradients accumulate; one at tp 4, to spare time.
            train__micro_batch_size=(2 if tp < 4 else 4) // dp,
        )
        for optimizer, stage in cases
    ]
    ranks = run_distributed(train_under_deepspeed, tp * dp, configs)
    return {case: [rank[i] for rank in ranks] for i, case in enumerate(cases)}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    "layout",
    [*LAYOUTS, *(pytest.param(layout, marks=pytest.mark.slow) for layout in SLOW_LAYOUTS)],
    ids=lambda x: f"tp{x[0]}{'-sp' if x[1] else ''}-dp{x[2]}",
)
def test_trains_like_the_plain_loop(layout: Layout, stage: int, optimizer: str) -> None:
    allowed = [TIMES_THE_NOISE * x for x in noise(optimizer)]
    for run in runs_of(layout)[optimizer, stage]:
        for what, found, limit in zip(
            ("loss", "gradient norm", "parameter"), distance(run, truth(optimizer)), allowed, strict=True
        ):
            assert found <= limit, f"{what} is off by {found:.2e}, rounding explains {limit:.2e}"


EVERYTHING = {
    "model__qk_norm": True,
    "model__attention_bias": True,
    "model__mlp_bias": True,
    "model__tie_word_embeddings": True,
    "model__attention_sinks": "local",
    "model__attention_softcap": 5.0,
    "model__final_logit_softcap": 8.0,
    "model__pattern": ("L", "G", 3, "G"),
    "model__rope_global": {"enabled": False},
    "model__rope_local": {"theta": 100.0},
    "train__micro_batch_size": 1,
}


def test_every_model_option_trains_like_the_plain_loop() -> None:
    """Tied weights, per-head norms, biases and sinks are where sharding, recomputation and ZeRO-3's hooks go wrong."""
    exact = train_plainly(config_for("sgd", **EVERYTHING), torch.float64)
    allowed = distance(train_plainly(config_for("sgd", **EVERYTHING)), exact)
    cases = [(0, "none"), (1, "selective"), (2, "full"), (3, "none"), (3, "selective"), (3, "full")]
    configs = [
        config_for("sgd", parallel__tensor=2, parallel__sequence_parallel=True, parallel__zero_stage=stage,
                   train__recompute=recompute, **EVERYTHING)
        for stage, recompute in cases
    ]  # fmt: skip
    for case, run in zip(cases, run_distributed(train_under_deepspeed, 4, configs)[0], strict=True):
        for found, limit in zip(distance(run, exact), allowed, strict=True):
            assert found <= TIMES_THE_NOISE * limit, case


def test_the_yardstick_can_fail() -> None:
    """One seed's data under another seed's weights is far outside the limits."""
    other = train_plainly(config_for("sgd", train__seed=1))
    assert distance(other, truth("sgd"))[0] > 1000 * TIMES_THE_NOISE * noise("sgd")[0]


@functools.cache
def bf16_truth_and_noise() -> tuple[list[Trajectory], tuple[float, ...]]:
    """For every seed; the noise added up over them, since one seed's is luck: 0.008 to 0.1 in the gradient norm."""
    exact = [train_plainly(config_for("sgd", train__seed=seed), torch.float64) for seed in BF16_SEEDS]
    plain = [train_plainly(config_for("sgd", train__seed=seed), torch.bfloat16) for seed in BF16_SEEDS]
    return exact, summed_distance(plain, exact)


def summed_distance(runs: list[Trajectory], references: list[Trajectory]) -> tuple[float, ...]:
    return tuple(map(sum, zip(*map(distance, runs, references), strict=True)))


@pytest.mark.parametrize("stage", [*(pytest.param(stage, marks=pytest.mark.slow) for stage in (1, 2)), 3])
def test_bf16_strays_no_further_than_a_plain_bf16_loop(stage: int) -> None:
    """The same yardstick with bf16's noise; weights are compared as the model computes with them, in bf16."""
    configs = [
        config_for("sgd", train__precision="bf16", train__seed=seed, parallel__zero_stage=stage, parallel__tensor=2,
                   parallel__sequence_parallel=True)
        for seed in BF16_SEEDS
    ]  # fmt: skip
    exact, allowed = bf16_truth_and_noise()
    found = summed_distance(run_distributed(train_under_deepspeed, 4, configs)[0], exact)
    assert all(x <= TIMES_THE_NOISE * limit for x, limit in zip(found, allowed, strict=True)), (found, allowed)
    assert found[0] > 100 * noise("sgd")[0], "this did not run in bf16"


def test_bf16_runs_stage_0_as_stage_1() -> None:
    stages = [config_for("adamw", train__precision="bf16", parallel__zero_stage=stage) for stage in (0, 1)]
    zero, one = run_distributed(train_under_deepspeed, 2, stages)[0]
    assert zero.losses == one.losses
    assert zero.grad_norms == one.grad_norms
