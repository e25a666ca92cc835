"""A run that stops and resumes is the run that never stopped, bit for bit."""

from __future__ import annotations

import tempfile
from typing import Any

import pytest
from support.distributed import run_distributed
from support.training import CPU, Trajectory, make_engine, run_steps, tiny_config
from torch import Tensor

from megazebra.checkpoint.manager import Checkpoints, Progress
from megazebra.config.schema import Config
from megazebra.models.initialization import full_weights
from megazebra.train.engine import TrainEngine, start_deepspeed

STEPS, STOP = 4, 2
DATA = {"order": {"version": 1}, "sources": {"a": {"corpus": "1"}}}


def weights_of(engine: TrainEngine) -> dict[str, Tensor]:
    return full_weights(engine.module, engine.mesh.tp, engine.gathered)


def train_with_and_without_stop(configs: list[Config]) -> list[tuple[Trajectory, Trajectory]]:
    start_deepspeed(CPU, timeout_s=60)
    results = []
    for config in configs:
        engine = make_engine(config)
        losses, norms = run_steps(engine, config, range(STEPS))
        whole = Trajectory(losses, norms, weights_of(engine))
        engine.deepspeed.destroy()

        engine = make_engine(config)
        losses, norms = run_steps(engine, config, range(STOP))
        checkpoints = Checkpoints(config, engine, DATA)
        assert checkpoints.save(Progress(STOP, STOP * 4, STOP * 128)) == [], "it is still being written"
        run_steps(engine, config, range(STOP, STOP + 1))  # what changes now must not be in it
        (saving,) = checkpoints.completed(wait=True)
        assert saving.step == STOP
        engine.deepspeed.destroy()

        # Other weights than the checkpoint's, so that whatever is not restored shows.
        engine = make_engine(config)
        progress = Checkpoints(config, engine, DATA).resume()
        assert progress == Progress(STOP, STOP * 4, STOP * 128)
        assert list(engine.guard.losses) == losses
        more_losses, more_norms = run_steps(engine, config, range(progress.step, STEPS))
        results.append((whole, Trajectory(losses + more_losses, norms + more_norms, weights_of(engine))))
        engine.deepspeed.destroy()
    return results


# Every kind of DeepSpeed's optimizers once.
CASES = [(0, "fp32", "adamw"), (1, "bf16", "adamw"), (2, "fp32", "adamw"), (3, "bf16", "adamw")]
MORE_CASES = [(1, "fp32", "adamw"), (3, "fp32", "adamw"), (2, "bf16", "adamw"), (1, "fp32", "sgd"), (3, "bf16", "sgd")]


@pytest.mark.parametrize(
    ("tp", "cp", "dp", "cases"),
    [
        (1, 1, 2, CASES),
        (1, 2, 1, CASES),
        (2, 1, 2, CASES),
        pytest.param(2, 1, 2, MORE_CASES, marks=pytest.mark.slow),
    ],
    ids=["dp2", "cp2", "tp2-dp2", "tp2-dp2-more"],
)
def test_resume_is_bitwise(tp: int, cp: int, dp: int, cases: list[tuple[int, str, str]], tmp_path: object) -> None:
    configs = [
        tiny_config(
            run__dir=f"{tmp_path}/{stage}-{precision}-{optimizer}",
            parallel__zero_stage=stage,
            parallel__tensor=tp,
            parallel__sequence_parallel=tp > 1,
            parallel__context=cp,
            train__precision=precision,
            train__steps=STEPS,
            train__micro_batch_size=2,
            train__guard={"enabled": True},
            optimizer__name=optimizer,
            optimizer__momentum=0.9 if optimizer == "sgd" else 0.0,
        )
        for stage, precision, optimizer in cases
    ]
    for rank in run_distributed(train_with_and_without_stop, tp * cp * dp, configs):
        for case, (whole, resumed) in zip(cases, rank, strict=True):
            assert resumed.losses == whole.losses, case
            assert resumed.grad_norms == whole.grad_norms, case
            for name, weight in whole.weights.items():
                assert weight.equal(resumed.weights[name]), (case, name)


def resume_under(saved: Config, others: list[tuple[Config, dict[str, Any]]]) -> list[str]:
    """Messages of the refusals when `saved`'s checkpoint is resumed under other configurations or data."""
    start_deepspeed(CPU, timeout_s=60)
    engine = make_engine(saved)
    checkpoints = Checkpoints(saved, engine, DATA)
    checkpoints.save(Progress(1, 4, 128))
    checkpoints.completed(wait=True)
    engine.deepspeed.destroy()
    messages = []
    for config, data in others:
        engine = make_engine(config)
        try:
            checkpoints = Checkpoints(config, engine, data)
            checkpoints.resume()
            messages.append("; ".join(["resumed", *checkpoints.notes]))
        except Exception as error:
            messages.append(f"{type(error).__name__}: {error}")
        engine.deepspeed.destroy()
    return messages


def test_refuses_what_is_another_run_and_names_it() -> None:
    with tempfile.TemporaryDirectory() as folder:
        changed = [
            {},
            {"optimizer__lr": 1e-5, "train__steps": 500, "schedule__kind": "linear"},
            {"model__ffn_hidden_size": 128},
            {"model__window": 7, "parallel__zero_stage": 2},
            {"optimizer__name": "sgd"},
        ]
        others = [(tiny_config(run__dir=folder, **change), DATA) for change in changed]
        others.append((tiny_config(run__dir=folder), {"order": {"version": 2}, "sources": {"b": {"corpus": "1"}}}))
        same, continued, model, window, optimizer, data = run_distributed(
            resume_under, 1, tiny_config(run__dir=folder), others
        )[0]
    assert same == "resumed"
    assert continued.split("; ") == [  # all of it may be changed on purpose
        "resumed",
        "changed: optimizer.lr from 0.01 to 1e-05",
        "changed: schedule.kind from cosine to linear",
        "changed: train.steps from 10 to 500",
    ]
    assert "the weight model.layers.0.mlp.down_proj.weight is [64, 96] there, [64, 128] here" in model
    assert window == "resumed; changed: layout.zero_stage from 0 to 2; changed: model.window from 5 to 7"
    assert "optimizer.name='adamw' there, 'sgd' here" in optimizer
    assert "the training data's order.version: 1 there, 2 here" in data
    assert "the training data's sources.a.corpus: 1 there, None here" in data
    assert "the training data's sources.b.corpus: None there, 1 here" in data
    assert "choose another run.dir" in data
