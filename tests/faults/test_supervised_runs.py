"""tools/supervise.py on real runs: what a launcher leaves behind, and fewer ranks for a while."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.command_line import ROOT, SETTINGS, environment, losses, train_rows
from support.faults import fault_time

from megazebra.supervise.supervisor import RECORD

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]

STEPS, INTERVAL, FAULT = 24, 5, 13
FORK_LAUNCHER = f"{sys.executable} {ROOT}/tests/support/fork_launcher.py {{ranks}} {{port}}"


def broken_program(folder: Path, *calls: str) -> Path:
    """pretrain_zebra.py with faults, as a script that a launcher can start."""
    path = folder / "broken_pretrain.py"
    path.write_text(
        f"import os, runpy, signal, sys\nfrom pathlib import Path\nsys.path.insert(0, {str(ROOT / 'tests')!r})\n"
        f"from support.faults import *\nfolder = Path({str(folder)!r})\n"
        + "\n".join(calls)
        + f"\nrunpy.run_path({str(ROOT / 'pretrain_zebra.py')!r}, run_name='__main__')\n"
    )
    return path


def command(program: Path, corpus: Path, run_dir: Path, *options: str) -> list[str]:
    """Of the supervisor, whose are the options."""
    return [
        sys.executable, str(ROOT / "tools" / "supervise.py"), "--pause-s=0.1", *options, "--", str(program), *SETTINGS,
        f"--train.steps={STEPS}", "--train.micro_batch_size=1", "--train.global_batch_size=12",
        f"--checkpoint.interval={INTERVAL}", "--validation.interval=0", f"--data.path={corpus}/train",
        f"--run.dir={run_dir}",
    ]  # fmt: skip


def supervise(*arguments: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=300)


def attempts(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / RECORD).read_text().splitlines()]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> list[tuple[int, float]]:
    folder = tmp_path_factory.mktemp("undisturbed")
    done = supervise(broken_program(folder), corpus, folder / "run", "--ranks=2", "--launch", FORK_LAUNCHER)
    assert done.returncode == 0, done.stdout + done.stderr
    return losses(folder / "run")


def test_the_launcher_is_killed(
    corpus: Path, tmp_path: Path, undisturbed: list[tuple[int, float]], record: Callable[..., None]
) -> None:
    """DeepSpeed's, which leaves its ranks behind and has a parent that ends with 0 then."""
    # The others must not end by themselves before it is seen that they are left.
    program = broken_program(tmp_path, f"kill_launcher(When(folder, range({FAULT}, {FAULT + 1}), (0,)))",
                             f"slow(When(folder / 'slow', range({FAULT}, {FAULT + 8})), 2.0)")  # fmt: skip
    (tmp_path / "slow").mkdir()
    done = supervise(program, corpus, tmp_path / "run", "--ranks=2", "--max-restarts=1")
    assert done.returncode == 0, done.stdout + done.stderr
    first, second = attempts(tmp_path / "run")
    assert first["exit_code"] == 0, "which is no success"
    assert "the run is not complete: its launcher may have been killed" in done.stderr
    assert second["first_step"] == first["saved_step"] >= FAULT - FAULT % INTERVAL
    assert losses(tmp_path / "run") == undisturbed
    record("the launcher gets SIGKILL", "the supervisor ends its ranks, starts again, and the run is complete",
           f"exit code 0 after {first['killed']} ranks were killed; from step {second['first_step']} on again",
           first["made_step"] - first["saved_step"], None)  # fmt: skip


def test_ranks_are_fewer_for_a_while(
    corpus: Path, tmp_path: Path, undisturbed: list[tuple[int, float]], record: Callable[..., None]
) -> None:
    """4, then 3 because one is lost, then 4 again."""
    available = tmp_path / "available"
    available.write_text("4")
    (tmp_path / "back").mkdir()
    program = broken_program(
        tmp_path,
        f"do(When(folder, range({FAULT}, {FAULT + 1}), (3,)), "
        f"lambda: (Path({str(available)!r}).write_text('3'), os.kill(os.getpid(), signal.SIGKILL)))",
        f"do(When(folder / 'back', range({FAULT + 2}, {FAULT + 3}), (0,)), "
        f"lambda: Path({str(available)!r}).write_text('4'))",
        "slow(When(folder / 'back', range(16, 19), (1,)), 1.0)",
    )
    done = supervise(program, corpus, tmp_path / "run", "--ranks=4", "--min-ranks=2", "--launch", FORK_LAUNCHER,
                     "--available", f"cat {available}", "--look-again-s=0.2")  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    first, fewer, again = attempts(tmp_path / "run")
    assert [first["ranks"], fewer["ranks"], again["ranks"]] == [4, 3, 4]
    assert first["exit_code"] == 128 + signal.SIGKILL
    assert fewer["exit_code"] == 85
    assert fewer["first_step"] == first["saved_step"] == FAULT - FAULT % INTERVAL
    assert again["first_step"] == fewer["made_step"] == fewer["saved_step"], "nothing is lost to make way for more"
    rows = train_rows(tmp_path / "run")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    # The same samples under another layout: sums in another order, in float32.
    assert losses(tmp_path / "run") == [(step, pytest.approx(loss, rel=2e-5)) for step, loss in undisturbed]
    record("1 of 4 ranks is lost, and comes back", "the run goes on with 3, then with 4",
           f"ranks {first['ranks']}, {fewer['ranks']}, {again['ranks']}, from steps 0, {fewer['first_step']}, "
           f"{again['first_step']}; the losses are those of 2 ranks",
           first["made_step"] - first["saved_step"], None)  # fmt: skip


def test_a_rank_is_killed_and_the_supervisor_asked_to_stop(
    corpus: Path, tmp_path: Path, record: Callable[..., None]
) -> None:
    (tmp_path / "slow").mkdir()
    program = broken_program(tmp_path, f"kill(When(folder, range({FAULT}, {FAULT + 1}), (1,)))",
                             f"slow(When(folder / 'slow', range({FAULT}, {STEPS + 1})), 0.5)")  # fmt: skip
    run_dir = tmp_path / "run"
    process = subprocess.Popen(command(program, corpus, run_dir, "--ranks=2", "--launch", FORK_LAUNCHER),
                               env=environment(), cwd=ROOT, stderr=subprocess.PIPE, text=True)  # fmt: skip
    deadline = time.monotonic() + 120
    while not (run_dir / RECORD).exists() or train_rows(run_dir)[-1]["step"] <= FAULT:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    started = time.monotonic()
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 85, errors
    killed, stopped = attempts(run_dir)
    assert killed["exit_code"] == 128 + signal.SIGKILL
    assert stopped["saved_step"] == stopped["made_step"] > FAULT
    assert time.time() > fault_time(tmp_path)
    record("rank 1 gets SIGKILL, the supervisor later SIGTERM", "started again; saved, and ends with 85",
           f"exit code 85, step {stopped['saved_step']} saved", stopped["made_step"] - stopped["saved_step"],
           time.monotonic() - started)  # fmt: skip
