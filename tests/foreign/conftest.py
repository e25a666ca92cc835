"""Folders that real DeepSpeed engines saved, for all tests of what reads them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from foreign.zero_writer import LAYOUTS, SMALL, save_with_deepspeed
from support.checkpoints import Truth
from support.distributed import run_distributed
from support.training import tiny_config

from megazebra.config.schema import Config

# tools/ is a folder of programs that find each other beside themselves; tests import them as they do.
sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))


@pytest.fixture(scope="session")
def zero_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Config, Truth]]:
    """Configuration, whose run.dir is DeepSpeed's folder, and what rank 0 gathered."""
    found: dict[str, tuple[Config, Truth]] = {}
    for ranks, layouts in LAYOUTS.items():
        folder = tmp_path_factory.mktemp("zero")
        configs = [tiny_config(run__dir=str(folder / name), **SMALL, **changes) for name, changes in layouts.items()]
        truths = run_distributed(save_with_deepspeed, ranks, configs)[0]
        found |= dict(zip(layouts, zip(configs, truths, strict=True), strict=True))
    return found
