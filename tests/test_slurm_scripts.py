"""examples/slurm without Slurm: what the scripts ask srun for, and what they make of its answer."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from megazebra.config import check_world, load_config, parse_command_line
from megazebra.config.stages import stages_of
from megazebra.launch import REQUEUE_EXIT_CODE

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "examples" / "slurm").glob("*.sbatch"))


def run(script: Path, folder: Path, code: int) -> tuple[int, list[str], str]:
    """The script's exit code, what it gave to pretrain_zebra.py, and what it gave to scontrol requeue."""
    programs = {
        "srun": f'printf "%s\\n" "$@" > {folder}/srun; exit {code}',
        "scontrol": f'[ "$1" = show ] && echo n1 || echo "$@" > {folder}/requeued',
        "activate": "",
    }
    (folder / "bin").mkdir()
    for name, body in programs.items():
        (folder / "bin" / name).write_text(f"#!/bin/sh\n{body}\n")
        (folder / "bin" / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_NAME": f"{folder}/log"}
    environment = {**os.environ, **slurm, "VENV": str(folder), "PATH": f"{folder}/bin:{os.environ['PATH']}"}
    done = subprocess.run(["bash", script, "--run.dir=runs/elsewhere"], env=environment, cwd=ROOT, timeout=60)
    arguments = (folder / "srun").read_text().splitlines()
    requeued = folder / "requeued"
    return (
        done.returncode,
        arguments[arguments.index("pretrain_zebra.py") + 1 :],
        requeued.read_text().strip() if requeued.exists() else "",
    )


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_a_run_that_was_stopped_is_requeued(script: Path, tmp_path: Path) -> None:
    code, arguments, requeued = run(script, tmp_path, REQUEUE_EXIT_CODE)
    assert (code, requeued) == (0, "requeue 7")
    command = parse_command_line(arguments)
    assert command.config_path is not None
    config = load_config(ROOT / command.config_path, command.overrides)
    assert config.run.dir == "runs/elsewhere"
    nodes, tasks = (re.search(rf"--{name}=(\d+)", script.read_text()) for name in ("nodes", "ntasks-per-node"))
    assert nodes is not None
    assert tasks is not None
    for stage in stages_of(config):
        check_world(stage.config, int(nodes[1]) * int(tasks[1]))


@pytest.mark.parametrize("code", [0, 2, 137])
def test_any_other_code_is_passed_on(code: int, tmp_path: Path) -> None:
    assert run(SCRIPTS[0], tmp_path, code)[::2] == (code, "")
