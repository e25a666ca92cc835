"""Configurations and commands that users copy from the repository are valid."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from megazebra.config import Config, check_world, load_config, parse_command_line
from megazebra.models.build import build_model, model_runtime
from megazebra.parallel.mesh import ParallelMesh
from megazebra.parallel.sharding import is_sharded
from megazebra.plan.flops import parameter_count
from megazebra.train.deepspeed_config import build_deepspeed_config

ROOT = Path(__file__).parents[1]


def commands_in(path: Path) -> list[str]:
    """Everything after `pretrain_zebra.py` in the file's shell lines."""
    text = path.read_text().replace("\\\n", " ")
    return re.findall(r"^(?:#\s+)?(?:deepspeed|srun|torchrun)\b.*pretrain_zebra\.py (.*)$", text, re.MULTILINE)


def load(command: str) -> Config:
    parsed = parse_command_line(shlex.split(command))
    assert parsed.config_path is not None
    return load_config(ROOT / parsed.config_path, parsed.overrides)


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda path: path.name)
def test_example_configurations_load(path: Path) -> None:
    config = load_config(path, [])
    assert config.run.dir != Config().run.dir, "an example must not share the default run folder"


def test_documented_commands_are_valid() -> None:
    commands = [(8 if "7b" in command else 2, command) for command in commands_in(ROOT / "README.md")]
    assert len(commands) >= 3
    for path in (ROOT / "examples").glob("*.yaml"):
        commands += [(8 if "7b" in command else 2, command) for command in commands_in(path)]
    for world_size, command in commands:
        config = load(command)
        check_world(config, world_size)
        build_deepspeed_config(config, world_size, None)


def test_the_cluster_example_fits_together_on_eight_ranks() -> None:
    """Built without memory (meta device) as rank 3 of a made-up group of 8: its shards are a share of 6.7 B weights."""
    config = load_config(ROOT / "examples" / "zebra_7b.yaml", [])
    dist.init_process_group("fake", rank=3, world_size=8, store=FakeStore())
    try:
        mesh = ParallelMesh.build(config.parallel)
        runtime = model_runtime(config, torch.device("cpu"))
        with torch.device("meta"):
            model = build_model(config, mesh, runtime)
    finally:
        dist.destroy_process_group()
    assert (mesh.tp.ranks, mesh.dp.ranks) == ((2, 3), (1, 3, 5, 7))
    sharded = sum(p.numel() for p in model.parameters() if is_sharded(p))
    shared = sum(p.numel() for p in model.parameters() if not is_sharded(p))
    assert 2 * sharded + shared == parameter_count(config.model)
    assert round(parameter_count(config.model) / 1e9, 2) == 6.74  # Llama-2-7B has as many
