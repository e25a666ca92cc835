"""Configurations and commands that users copy from the repository are valid."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from megazebra.config import Config, check_world, load_config, parse_command_line
from megazebra.config.stages import stages_of
from megazebra.models.build import build_model, model_runtime
from megazebra.parallel.mesh import ParallelMesh
from megazebra.parallel.sharding import is_sharded
from megazebra.plan.flops import parameter_count
from megazebra.plan.layouts import judge
from megazebra.plan.profile import load_profile
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
        commands += [(8 if path in ZOO else 2, command) for command in commands_in(path)]
    for world_size, command in commands:
        for stage in stages_of(load(command)):
            check_world(stage.config, world_size)
            build_deepspeed_config(stage.config, world_size, None)


def recommended_layouts(path: Path) -> Iterator[tuple[int, Config, str, float]]:
    """Of the table in a file's comments: GPUs, the stage's configuration, its layout as a row says it, memory in GB."""
    stages = {stage.name: stage.config for stage in stages_of(load_config(path, []))}
    config = stages.get("")
    for line in path.read_text().splitlines():
        if heading := re.fullmatch(r"#   stage (\w+)", line):
            config = stages[heading[1]]
        if row := re.fullmatch(r"# +(\d+) +(\d+) +(\d+) +(\d) +(\w+) +(\d+) +([\d.]+) GB +[\d,]+", line):
            assert config is not None
            gpus, tensor, context, zero_stage, recompute, micro_batch_size, memory = row.groups()
            parallel = {"tensor": int(tensor), "context": int(context), "zero_stage": int(zero_stage)}
            parallel["sequence_parallel"] = int(tensor) > 1
            train = {"recompute": recompute, "micro_batch_size": int(micro_batch_size)}
            tree = config.model_dump()
            tree["parallel"] |= parallel
            tree["train"] |= train
            yield int(gpus), Config.model_validate(tree), line, float(memory)


ZOO = sorted(path for path in (ROOT / "examples").glob("*.yaml") if "#   GPUs" in path.read_text())


@pytest.mark.parametrize("path", ZOO, ids=lambda path: path.name)
def test_the_layouts_told_fit_and_take_the_memory_told(path: Path) -> None:
    profile = load_profile("h100")
    layouts = list(recommended_layouts(path))
    assert {gpus for gpus, *_ in layouts} == {8, 64, 512}
    for gpus, config, line, memory in layouts:
        judged = judge(config, gpus, profile)
        assert judged.fits, f"{line}: {judged.refusal}"
        assert judged.memory is not None
        assert round(judged.memory.total / 1e9, 1) == memory, line


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
