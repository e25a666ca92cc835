"""A process's place among its peers, and how errors end it."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megazebra import launch
from megazebra.errors import UserError

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment without a launcher's variables, put back afterwards."""
    for name in [*NAMES, *(name for name in os.environ if name.startswith("SLURM_"))]:
        monkeypatch.setenv(name, "")  # so that the original value is restored whatever the test sets
        monkeypatch.delenv(name)
    return monkeypatch


def place() -> list[str]:
    return [os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")]


def test_a_plain_process_is_alone(bare: pytest.MonkeyPatch) -> None:
    launch.complete_environment()
    assert place() == ["0", "1", "0", "1"]
    assert (launch.rank(), launch.world_size()) == (0, 1)


def test_a_launchers_word_stands(bare: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_SIZE": "2"}.items():
        bare.setenv(name, value)
    bare.setenv("SLURM_STEP_NUM_TASKS", "1")  # DeepSpeed's launcher inside an srun step
    launch.complete_environment()
    assert place() == ["3", "8", "1", "2"]


def test_an_srun_task_takes_slurms_names(bare: pytest.MonkeyPatch, tmp_path: Path) -> None:
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\n[ "$*" = "show hostnames n[7-10]" ] && printf "n7\\nn8\\nn9\\nn10\\n"\n')
    scontrol.chmod(0o755)
    bare.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for name, value in {
        "PROCID": "9", "STEP_NUM_TASKS": "32", "LOCALID": "1", "STEP_TASKS_PER_NODE": "8(x4)", "JOB_ID": "123456",
        "STEP_NODELIST": "n[7-10]",
    }.items():  # fmt: skip
        bare.setenv(f"SLURM_{name}", value)
    launch.complete_environment()
    assert place() == ["9", "32", "1", "8"]
    assert os.environ["MASTER_ADDR"] == "n7"
    assert os.environ["MASTER_PORT"] == "23456"


def test_srun_without_scontrol_says_what_to_set(bare: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bare.setenv("PATH", str(tmp_path))
    for name, value in {"PROCID": "0", "STEP_NUM_TASKS": "2", "LOCALID": "0", "STEP_TASKS_PER_NODE": "2", "JOB_ID": "1",
                        "STEP_NODELIST": "n[1-2]"}.items():  # fmt: skip
        bare.setenv(f"SLURM_{name}", value)
    with pytest.raises(UserError, match=r"SLURM_STEP_NODELIST=n\[1-2\].*export MASTER_ADDR"):
        launch.complete_environment()


def end(body: str, **environment: str) -> subprocess.CompletedProcess[str]:
    imports = "from megazebra.errors import UserError\nfrom megazebra.launch import readable_errors\n"
    code = f"{imports}with readable_errors():\n    {body}\n"
    clean = {name: value for name, value in os.environ.items() if name not in NAMES}
    return subprocess.run(
        [sys.executable, "-c", code], env={**clean, **environment}, capture_output=True, text=True, timeout=60
    )


def test_a_users_error_is_one_message() -> None:
    result = end("raise UserError('model.window=0: must be >= 1')")
    assert (result.returncode, result.stdout, result.stderr) == (2, "", "error: model.window=0: must be >= 1\n")


def test_a_file_server_that_does_not_answer_is_no_message_to_the_user() -> None:
    assert launch.is_users(OSError(errno.EACCES, "Permission denied", "corpus.bin"))
    assert not launch.is_users(OSError(errno.ETIMEDOUT, "Connection timed out", "corpus.bin"))


def test_another_rank_says_who_it_is_after_rank_0_had_its_time() -> None:
    result = end("raise UserError('data.path: not on this node')", RANK="5")
    assert result.returncode == 2
    assert result.stderr == "rank 5: error: data.path: not on this node\n"


@pytest.mark.parametrize("body", ["raise KeyError('bug')", "__import__('numpy').zeros(-1)", "int('x')"])
def test_a_bug_shows_its_traceback(body: str) -> None:
    """A ValueError that another library raises is a defect of ours, not a message for the user."""
    result = end(body)
    assert result.returncode == 1
    assert "Traceback" in result.stderr


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("from megazebra.config import load_config; load_config(None, ['model.window=0'])", "model.window=0"),
        ("open('/nowhere/metrics.jsonl', 'w')", "No such file or directory: '/nowhere/metrics.jsonl'"),
        ("raise OSError(28, 'No space left on device', 'runs/metrics.jsonl')", "No space left on device"),
    ],
)
def test_our_own_value_errors_and_files_are_messages(body: str, message: str) -> None:
    result = end(body)
    assert result.returncode == 2, result.stderr
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_a_users_error_shows_its_traceback_on_demand() -> None:
    result = end("raise UserError('x')", MEGAZEBRA_TRACEBACK="1")
    assert "Traceback" in result.stderr
    assert result.stderr.endswith("error: x\n")


def test_a_lost_peer_is_explained() -> None:
    result = end("raise RuntimeError('[1] gloo: Connection closed by peer [127.0.0.1]:1')")
    assert result.returncode == 1
    assert "rank 0 lost the connection to another rank" in result.stderr
    assert "Traceback" not in result.stderr
