"""A bad update never reaches the weights, under every ZeRO stage, and the run goes on or ends with a reason."""

from __future__ import annotations

import math

import torch
from support.distributed import run_distributed
from support.training import CPU, make_engine, step_batches, tiny_config
from torch import Tensor, nn

from megazebra.config.schema import Config
from megazebra.data.batch import MicroBatch
from megazebra.models.build import forward
from megazebra.models.initialization import full_weights
from megazebra.train.engine import TrainEngine, start_deepspeed
from megazebra.train.guard import TrainingDivergedError

CASES = [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (1, "bf16"), (2, "bf16"), (3, "bf16")]


class InfiniteGradient(torch.autograd.Function):
    """A finite loss whose gradient is not."""

    @staticmethod
    def forward(ctx: object, loss: Tensor) -> Tensor:
        return loss.clone()

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return grad * math.inf


def poisoned(what: str):
    def run(module: nn.Module, batch: MicroBatch) -> Tensor:
        loss = forward(module, batch)
        return loss * math.nan if what == "loss" else InfiniteGradient.apply(loss)

    return run


def state_of(engine: TrainEngine) -> dict[str, Tensor]:
    return full_weights(engine.module, engine.mesh.tp, engine.gathered)


def moments_of(engine: TrainEngine) -> list[Tensor]:
    return [value.clone() for state in engine.optimizer.state.values() for value in state.values()]


def poison_two_steps(configs: list[Config]) -> list[dict[str, object]]:
    start_deepspeed(CPU, timeout_s=60)
    seen = []
    for config in configs:
        engine = make_engine(config)

        def step(number: int, what: str | None = None, engine: TrainEngine = engine, config: Config = config):
            # Only one rank's batch is bad; all must agree to skip.
            bad = what is not None and engine.mesh.world.rank == 1
            engine.forward = poisoned(what) if bad else forward
            batches = step_batches(config, number, engine.mesh.dp.rank, engine.mesh.dp.size)
            return engine.train_step(batches, number)

        good = step(0)
        before = state_of(engine)
        moments = moments_of(engine)
        skips = [step(1, "loss").skipped, step(2, "gradient").skipped]
        after = state_of(engine)
        moments_after = moments_of(engine)
        again = step(3)
        skips_in_a_row = engine.guard.skips_in_a_row
        message = ""
        try:
            for number in range(4, 20):
                engine.guard.check(step(number, "loss").skipped, f"samples of step {number}")
        except TrainingDivergedError as error:
            message = str(error)
        seen.append(
            {
                "skips": skips,
                "unchanged": all(before[name].equal(after[name]) for name in before),
                "moments unchanged": all(a.equal(b) for a, b in zip(moments, moments_after, strict=True)),
                "good": good.skipped is None and again.skipped is None and math.isfinite(again.loss),
                "moved": not all(after[name].equal(weight) for name, weight in state_of(engine).items()),
                "in a row": skips_in_a_row,
                "message": message,
            }
        )
        engine.deepspeed.destroy()
    return seen


def test_nan_and_infinite_gradients_are_skipped_counted_and_end_the_run() -> None:
    configs = [
        tiny_config(
            parallel__zero_stage=stage,
            train__precision=precision,
            train__micro_batch_size=2,
            train__guard={"enabled": True, "max_consecutive_skips": 3},
        )
        for stage, precision in CASES
    ]
    for rank in run_distributed(poison_two_steps, 2, configs):
        for case, seen in zip(CASES, rank, strict=True):
            loss, gradient = seen["skips"]
            assert loss == "loss is nan", case
            assert gradient.startswith("gradient norm is"), case
            assert seen["unchanged"], case
            assert seen["moments unchanged"], case
            assert seen["good"], case
            assert seen["moved"], case
            assert seen["in a row"] == 0, case
            assert "3 updates in a row were skipped" in seen["message"], case
            assert "last batch: samples of step 6" in seen["message"], case


def test_with_the_guard_off_zero_still_drops_what_is_not_finite_and_that_is_said() -> None:
    configs = [tiny_config(train__guard={"enabled": False}, parallel__zero_stage=stage) for stage in range(4)]
    configs.append(tiny_config(train__guard={"enabled": True}))
    *zero, guarded = run_distributed(train_past_a_nan, 1, configs)[0]
    assert zero[0] == (None, False), "without guard and ZeRO nothing stops a NaN"
    for skipped, finite in zero[1:]:
        assert skipped == "gradient norm is inf, which ZeRO refuses"
        assert finite
    assert guarded == ("loss is nan", True)


def train_past_a_nan(configs: list[Config]) -> list[tuple[str | None, bool]]:
    """Per configuration: why the update was skipped, and whether the weights are finite afterwards."""
    start_deepspeed(CPU, timeout_s=60)
    seen = []
    for config in configs:
        engine = make_engine(config)
        engine.forward = poisoned("loss")
        skipped = engine.train_step(step_batches(config, 0, 0, 1), 0).skipped
        seen.append((skipped, all(bool(weight.isfinite().all()) for weight in state_of(engine).values())))
        engine.deepspeed.destroy()
    return seen
