"""Configurations and commands that users copy from the repository are valid."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from megazebra.config import Config, check_world, load_config, parse_command_line
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
