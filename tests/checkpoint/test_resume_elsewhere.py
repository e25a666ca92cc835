"""A checkpoint resumed under another layout: the same state to the last bit, then the same run to rounding."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
from support.distributed import run_distributed
from support.training import CPU, Trajectory, distance, make_engine, run_steps, tiny_config, train_plainly
from torch import Tensor, float64

from megazebra.checkpoint.fragments import owned_pieces
from megazebra.checkpoint.manager import Checkpoints, Progress
from megazebra.config.schema import Config
from megazebra.models.initialization import full_weights
from megazebra.train.engine import TrainEngine, start_deepspeed

STEPS, STOP = 8, 3
DATA: dict[str, Any] = {"sources": {}}
TIMES_THE_NOISE = 6
# (tp, cp, dp, ZeRO stage, micro-batch)
LAYOUTS = {
    "tp2-dp2-zero3": (2, 1, 2, 3, 1),
    "tp4-zero0": (4, 1, 1, 0, 2),
    "dp4-zero1": (1, 1, 4, 1, 1),
    "cp2-tp2-zero2": (2, 2, 1, 2, 1),
    "one": (1, 1, 1, 0, 4),
}


def config_for(layout: str, folder: Path | str, **more: Any) -> Config:
    tp, cp, _, stage, micro = LAYOUTS[layout]
    return tiny_config(
        run__dir=str(folder),
        optimizer__name="adamw",
        train__steps=STEPS,
        train__micro_batch_size=micro,
        parallel__tensor=tp,
        parallel__sequence_parallel=tp > 1,
        parallel__context=cp,
        parallel__zero_stage=stage,
        **more,
    )


def ranks_of(layout: str) -> int:
    tp, cp, dp, *_ = LAYOUTS[layout]
    return tp * cp * dp


def state_of(engine: TrainEngine) -> tuple[dict[str, Tensor], float]:
    """Whole weights; the sum of squares of this rank's second moments, which all ranks together have alike."""
    weights = full_weights(engine.module, engine.mesh.tp, engine.gathered)
    return weights, sum(
        float(piece.view(engine.optimizer.state[piece.buffer]["exp_avg_sq"]).double().sum())
        for piece in owned_pieces(engine)
    )


def train_and_save(config: Config) -> dict[str, Tensor]:
    start_deepspeed(CPU, timeout_s=120)
    engine = make_engine(config)
    run_steps(engine, config, range(STOP))
    checkpoints = Checkpoints(config, engine, DATA)
    checkpoints.save(Progress(STOP, STOP * 4, STOP * 128))
    checkpoints.completed(wait=True)
    weights, _ = state_of(engine)
    return weights


def resume_and_train(configs: list[Config]) -> list[tuple[dict[str, Tensor], Trajectory]]:
    start_deepspeed(CPU, timeout_s=120)
    results = []
    for config in configs:
        engine = make_engine(config)
        progress = Checkpoints(config, engine, DATA).resume()
        assert progress == Progress(STOP, STOP * 4, STOP * 128)
        weights, _ = state_of(engine)
        losses, norms = run_steps(engine, config, range(STOP, STEPS))
        results.append(
            (weights, Trajectory(losses, norms, full_weights(engine.module, engine.mesh.tp, engine.gathered)))
        )
        engine.deepspeed.destroy()
    return results


@functools.cache
def truth_and_noise() -> tuple[Trajectory, tuple[float, ...]]:
    config = config_for("one", "nowhere")
    truth = train_plainly(config, float64)
    return truth, distance(train_plainly(config), truth)


@pytest.mark.parametrize("saved", ["tp2-dp2-zero3", "tp4-zero0", "dp4-zero1", "cp2-tp2-zero2", "one"])
def test_every_layout_goes_on_from_every_other(saved: str, tmp_path: Path) -> None:
    weights = run_distributed(train_and_save, ranks_of(saved), config_for(saved, tmp_path))[0]
    truth, noise = truth_and_noise()
    rest = Trajectory(truth.losses[STOP:], truth.grad_norms[STOP:], truth.weights)
    others = [layout for layout in LAYOUTS if layout != saved] if saved == "tp2-dp2-zero3" else ["tp2-dp2-zero3"]
    for layout in others:
        for loaded, run in (
            rank[0] for rank in run_distributed(resume_and_train, ranks_of(layout), [config_for(layout, tmp_path)])
        ):
            for name, weight in weights.items():
                assert loaded[name].equal(weight), (layout, name)
            # Moments that were lost would show at once: AdamW without them takes steps of the learning rate's size.
            for what, found, limit in zip(
                ("loss", "gradient norm", "parameter"), distance(run, rest), noise, strict=True
            ):
                assert found <= TIMES_THE_NOISE * limit, (layout, what, found, limit)
