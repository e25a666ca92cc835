"""How far a run has come, by what lies in its folder; on how many ranks it can go on."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

from megazebra.config import ConfigError, check_world
from megazebra.config.stages import Stage

_TAIL_BYTES = 1 << 16


def saved_step(run_dir: Path) -> int:
    """Step of the newest complete checkpoint; 0 where there is none."""
    try:
        name = (run_dir / "checkpoints" / "latest").read_text().strip()
    except (OSError, ValueError):
        return 0
    match = re.fullmatch(r"step_(\d{8,})", name)
    return int(match[1]) if match else 0


def made_step(run_dir: Path) -> int:
    """The last step that metrics.jsonl knows of; 0 where there is none."""
    try:
        with (run_dir / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            lines = file.read().splitlines()
    except OSError:
        return 0
    for line in reversed(lines):
        try:
            row = json.loads(line)
        except ValueError:  # cut short by a kill, or by us
            continue
        if isinstance(row, dict) and row.get("kind") == "train":
            return int(row["step"])
    return 0


def file_identity(run_dir: Path) -> int | None:
    """Another number when the metrics were opened anew, as every start of the run does: it writes the rows that count
    into a new file. None where there is none."""
    try:
        return (run_dir / "metrics.jsonl").stat().st_ino
    except OSError:
        return None


def largest_world(stages: Sequence[Stage], available: int, least: int) -> int | None:
    """The largest number of ranks from `least` to `available` under which all stages run; None where there is none.

    The layout decides (tensor and context parallelism keep their sizes) and the global batch, which stays what it is:
    what is learned at a step does not depend on the number of ranks.
    """
    for world_size in range(available, max(least, 1) - 1, -1):
        try:
            for stage in stages:
                check_world(stage.config, world_size)
        except ConfigError:
            continue
        return world_size
    return None
