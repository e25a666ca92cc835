"""Checkpoints that real engines wrote under several layouts, for all tests of what reads them."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import STEPS, Truth, save_runs
from support.distributed import run_distributed
from support.training import tiny_config

from megazebra.config.schema import Config

# tools/ is a folder of programs that find each other beside themselves; tests import them as they do.
sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

LAYOUTS: dict[int, dict[str, dict[str, Any]]] = {
    4: {
        "tp2-dp2-zero3": {
            "parallel__tensor": 2, "parallel__sequence_parallel": True, "parallel__zero_stage": 3,
            "train__precision": "bf16",
        },
        "tp4-zero0": {"parallel__tensor": 4, "parallel__sequence_parallel": True, "model__tie_word_embeddings": True},
        "tp2-cp2-zero2": {"parallel__tensor": 2, "parallel__context": 2, "parallel__zero_stage": 2},
    },
    2: {"dp2-zero1": {"parallel__zero_stage": 1, "train__precision": "bf16"}},
    1: {"one-process": {"model__attention_sinks": "local"}},
}  # fmt: skip


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Config, Truth]]:
    """Trained and saved under every layout: configuration and what rank 0 gathered."""
    found: dict[str, tuple[Config, Truth]] = {}
    for ranks, layouts in LAYOUTS.items():
        folder = tmp_path_factory.mktemp("runs")
        configs = [tiny_config(run__dir=str(folder / name), **changes) for name, changes in layouts.items()]
        truths = run_distributed(save_runs, ranks, configs)[0]
        found |= dict(zip(layouts, zip(configs, truths, strict=True), strict=True))
    return found


@pytest.fixture(params=[name for layouts in LAYOUTS.values() for name in layouts])
def run(request: pytest.FixtureRequest, runs: dict[str, tuple[Config, Truth]]) -> tuple[Config, Truth]:
    """Each of the runs in turn."""
    return runs[request.param]


@pytest.fixture
def sharded(runs: dict[str, tuple[Config, Truth]], tmp_path: Path) -> Path:
    """A copy, to be damaged, of the checkpoint of two tensor- and two data-parallel ranks."""
    run_dir = Path(runs["tp2-dp2-zero3"][0].run.dir)
    return Path(shutil.copytree(run_dir / "checkpoints" / f"step_{STEPS:08d}", tmp_path / "copy"))
