"""A checkpoint resumed in another precision: the same fp32 state to the last bit, then that precision's own run."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from support.checkpoints import Truth, truth
from support.distributed import run_distributed
from support.training import CPU, Trajectory, distance, make_engine, run_steps, tiny_config, train_plainly

from megazebra.checkpoint.manager import Checkpoints, Progress
from megazebra.config.schema import Config
from megazebra.train.engine import start_deepspeed

STEPS = 3  # of every link
TIMES_THE_NOISE = 6  # of a plain loop in the same precision, against one in float64
# Every link resumes what the one before it saved. DeepSpeed keeps master weights in another place under each of these.
CHAIN = [("fp32", 2), ("bf16", 1), ("fp32", 0), ("bf16", 3), ("fp32", 3), ("bf16", 2)]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class Link:
    """before, after: whole states when it had resumed, and when it saved. notes: what the log says of the resuming."""

    before: Truth
    after: Truth
    trajectory: Trajectory
    notes: list[str]


def links(folder: Path) -> list[Config]:
    return [
        tiny_config(
            run__dir=str(folder), schedule__kind="constant", train__steps=STEPS * (number + 1),
            train__precision=precision, parallel__zero_stage=stage,
        )
        for number, (precision, stage) in enumerate(CHAIN)
    ]  # fmt: skip


def train_chain(configs: list[Config]) -> list[Link]:
    start_deepspeed(CPU, timeout_s=120)
    found = []
    for config in configs:
        engine = make_engine(config)
        checkpoints = Checkpoints(config, engine, {})
        first = checkpoints.resume().step
        assert first == config.train.steps - STEPS
        before = truth(engine) if first else Truth({}, {})  # there are no moments before the first step
        losses, norms = run_steps(engine, config, range(first, config.train.steps))
        after = truth(engine)
        masters = {name: states["master"] for name, states in after.states.items()}
        checkpoints.save(Progress(config.train.steps))
        checkpoints.completed(wait=True)
        found.append(Link(before, after, Trajectory(losses, norms, masters), checkpoints.notes))
        engine.deepspeed.destroy()
    return found


@pytest.mark.slow
def test_every_precision_goes_on_from_the_other(tmp_path: Path) -> None:
    configs = links(tmp_path)
    chain = run_distributed(train_chain, 2, configs)[0]
    for (previous, link), config in zip(pairwise(chain), configs[1:], strict=True):
        case = (config.train.precision, config.parallel.zero_stage)
        dtype, first = DTYPES[config.train.precision], config.train.steps - STEPS
        other = "bf16" if config.train.precision == "fp32" else "fp32"
        for name, states in previous.after.states.items():
            for what, values in states.items():
                assert link.before.states[name][what].equal(values), (case, name, what)
            weight = link.before.weights[name]
            assert weight.dtype == dtype
            assert weight.equal(states["master"].to(dtype)), (case, name)
        exact = train_plainly(config, torch.float64, first, link.before.states)
        plain = train_plainly(config, dtype, first, link.before.states)
        for what, found, noise in zip(
            ("loss", "gradient norm", "parameter"),
            distance(link.trajectory, exact),
            distance(plain, exact),
            strict=True,
        ):
            assert found <= TIMES_THE_NOISE * noise, (case, what, found, noise)
        assert f"changed: train.precision from {other} to {config.train.precision}" in link.notes
