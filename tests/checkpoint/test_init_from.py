"""A run that begins with the weights of another one, under any layout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.checkpoints import Truth
from support.distributed import run_distributed
from support.training import CPU, tiny_config
from torch import Tensor

from megazebra.checkpoint.merge import Merge
from megazebra.checkpoint.reader import TrainingCheckpoint
from megazebra.checkpoint.weights import ReadOnDemand, open_weights
from megazebra.config.schema import Config
from megazebra.models.build import build_model, forward, model_runtime
from megazebra.models.initialization import full_weights
from megazebra.parallel.mesh import ParallelMesh
from megazebra.train.deepspeed_config import deepspeed_config
from megazebra.train.engine import TrainEngine, start_deepspeed


def begin(configs: list[Config], path: str) -> list[dict[str, Tensor]]:
    """Whole weights of engines that begin with those at `path` (called on every rank)."""
    start_deepspeed(CPU, timeout_s=60)
    found = []
    for config in configs:
        mesh = ParallelMesh.build(config.parallel)
        runtime = model_runtime(config, CPU)
        engine = TrainEngine(config, mesh, CPU, deepspeed_config(config, mesh.dp.size),
                             lambda c=config, m=mesh, r=runtime: build_model(c, m, r), forward,
                             ReadOnDemand(open_weights(path)))  # fmt: skip
        found.append(full_weights(engine.module, mesh.tp, engine.gathered))
        engine.deepspeed.destroy()
    return found


def test_every_layout_begins_with_the_same_weights(runs: dict[str, tuple[Config, Truth]], tmp_path: Path) -> None:
    saved, truth = runs["tp2-dp2-zero3"]
    merged = tmp_path / "merged"
    Merge(TrainingCheckpoint.open(saved.run.dir), merged, torch.bfloat16, False).write(1 << 20, lambda _: None)
    layouts = [{"parallel__zero_stage": 3}, {"parallel__zero_stage": 1}, {"parallel__tensor": 2},
               {"parallel__tensor": 2, "parallel__zero_stage": 3}]  # fmt: skip
    configs = [tiny_config(**layout) for layout in layouts]
    for path, what in ((merged, truth.weights), (saved.run.dir, {n: s["master"] for n, s in truth.states.items()})):
        for found in run_distributed(begin, 2, configs, str(path))[0]:
            for name, weight in what.items():
                assert found[name].equal(weight.to(found[name].dtype)), name


def test_another_shape_is_an_error(runs: dict[str, tuple[Config, Truth]]) -> None:
    saved, _ = runs["one-process"]
    with pytest.raises(
        RuntimeError, match=r"weights do not fit the model: .*mlp.down_proj.weight has shape \(64, 96\)"
    ):
        run_distributed(begin, 1, [tiny_config(model__ffn_hidden_size=128, model__attention_sinks="local")],
                        saved.run.dir)  # fmt: skip
