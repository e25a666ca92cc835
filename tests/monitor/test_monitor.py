"""The terminal view: following a file that grows, what is understood of it, and what is drawn at any width."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from megazebra.config import load_config, save_config
from megazebra.errors import UserError
from megazebra.monitor.follow import Follower
from megazebra.monitor.frame import WIDE, duration
from megazebra.monitor.plot import blocks, braille
from megazebra.monitor.state import SILENT_S, SILENT_STEPS
from megazebra.monitor.watching import Monitor

TOOL = Path(__file__).parents[2] / "tools" / "monitor.py"
STEPS = 50
WIDTHS = (40, 80, 120, 200)


def train_row(step: int, **more: Any) -> dict[str, Any]:
    return {
        "kind": "train", "step": step, "tokens": 4096 * step, "loss": 8.0 - step / 10, "grad_norm": 1.5, "lr": 0.002,
        "step_time_s": 0.5, "data_wait_s": 0.05, "work_s": 0.25, "slowest_rank": 3, "step_spread_s": 0.125,
        "tokens_per_s": 8192.0, "flops_per_s": 3e9, "mfu": 0.4321, "comm_bytes": 3000, "stage": "long",
        "comm": {"dp.all_reduce": {"calls": 2, "bytes": 1000}, "tp.all_reduce": {"calls": 5, "bytes": 1500},
                 "tp.all_gather": {"calls": 2, "bytes": 500}},
        "peak_memory_bytes": 5_000_000_000, **more,
    }  # fmt: skip


def write(folder: Path, *rows: dict[str, Any]) -> None:
    with (folder / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Twenty steps of a run."""
    folder = tmp_path / "zebra"
    folder.mkdir()
    save_config(load_config(None, [f"train.steps={STEPS}", "model.num_layers=4"]), folder / "config.yaml")
    write(folder, {"kind": "stage", "step": 0, "name": "long", "number": 2, "config": {}})
    for step in range(1, 21):
        skipped = {"skipped": "loss is nan", "samples": "samples 8 to 11", "loss": None} if step == 9 else {}
        write(folder, train_row(step, **skipped))
    for step, loss in ((10, 7.25), (20, 6.125)):
        write(folder, {"kind": "validation", "step": step, "source": "books", "loss": loss, "seconds": 1.0})
    for depth, right in ((0.0, 0.75), (0.5, 0.25), (1.0, 1.0)):
        answers = {"task": "passkey", "length": 4096, "depth": depth, "loss": 0.5, "exact_match": right}
        write(folder, {"kind": "evaluation", "step": 10, **answers, "exact_match": 0.0})  # an earlier one
        write(folder, {"kind": "evaluation", "step": 20, **answers, "token_accuracy": 0.875, "perplexity": None})
    for start in (0, 2048):
        spans = {"task": "text", "length": 4096, "start": start, "end": start + 2048, "loss": 3.0 - start / 4096}
        write(folder, {"kind": "evaluation", "step": 20, **spans, "token_accuracy": 0.4, "exact_match": None})
    write(folder, {"kind": "data", "step": 20, "epochs": {"web": 0.0625}})
    write(folder, {"kind": "checkpoint", "step": 20, "bytes": 12_000_000, "stall_s": 0.25, "seconds": 1.5})
    return folder


@pytest.fixture
def shown(run: Path) -> Callable[..., str]:
    """The picture of the run, as text; every line fits the width."""

    def show(width: int = WIDE, height: int = 60) -> str:
        console = Console(file=io.StringIO(), width=width, height=height, markup=False, highlight=False)
        with Monitor(run) as monitor:
            monitor.poll()
            console.print(monitor.frame(width, height))
        text: str = console.file.getvalue()  # type: ignore[attr-defined]
        assert all(len(line) <= width for line in text.splitlines())
        return text

    return show


def words(text: str) -> str:
    return " ".join(text.split())


def test_everything_measured_is_there(shown: Callable[..., str]) -> None:
    text = words(shown())
    for expected in (
        "zebra stage long running",
        f"step 20 of {STEPS} (40.0%), 15 s left at this speed",
        "loss, steps 1 to 20",
        "loss 6.0000 6.9000",  # now, and the median of those steps that have one
        "gradient norm 1.5 1.5",
        "learning rate 2.000e-03",
        "throughput 8.19 ktok/s",
        "MFU 43.2% 43.2%",
        "step 500 ms 500 ms",
        "waiting for data 50 ms",
        "spread of ranks 125 ms",
        "mostly the slowest rank 3 (100%)",
        "peak memory, rank 0 5 GB",
        "tokens 81,920",
        "skipped updates 1 (step 9)",
        "books 6.1250 7.2500 20",
        "passkey 4,096 66.7% 25.0% 0.500 20",  # means over depths, and the worst of them
        "text 4,096 – – 2.750 20",
        "tp 7 2 kB",
        "dp 2 1 kB",
        "checkpoints: 1 size",
        "step 20 12 MB 250 ms 1.5 s",
        "epochs: web 0.0625",
    ):
        assert expected in text, expected


@pytest.mark.parametrize("width", WIDTHS)
def test_it_fits_the_terminal(width: int, shown: Callable[..., str]) -> None:
    text = shown(width, height=24)
    side_by_side = any("median of" in line and "validation loss" in line for line in text.splitlines())
    assert side_by_side == (width >= WIDE)
    bar = min(width, 120)
    assert "\n" + "━" * (bar * 2 // 5) + "╌" * (bar - bar * 2 // 5) in text
    assert "running" in text
    assert "passkey" in text


def test_what_a_run_is_doing(run: Path, shown: Callable[..., str]) -> None:
    metrics = run / "metrics.jsonl"
    for age, status in ((SILENT_S - 30, "running"), (SILENT_S + 60, "nothing written for 3 min 0 s")):
        os.utime(metrics, (time.time() - age,) * 2)
        assert status in words(shown())
    write(run, *(train_row(step, step_time_s=60.0) for step in range(21, 31)))
    os.utime(metrics, (time.time() - SILENT_S - 60,) * 2)
    assert "nothing written" in shown(), "the median step takes half a second"
    write(run, *(train_row(step, step_time_s=60.0) for step in range(31, STEPS)))
    slow = time.time() - SILENT_STEPS * 60 * 0.4
    os.utime(metrics, (slow, slow))
    assert "running" in shown(), "slow steps are silent for long"
    write(run, train_row(STEPS))
    assert "the last checkpoint is being saved" in words(shown())
    write(run, {"kind": "checkpoint", "step": STEPS, "bytes": 1, "stall_s": 0.0, "seconds": 0.0})
    os.utime(metrics, (0, 0))
    assert "zebra stage long finished" in words(shown())


def test_a_run_without_steps_or_configuration(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no folder; give that of a run"):
        Monitor(tmp_path / "absent")
    console = Console(file=io.StringIO(), width=80)
    with Monitor(tmp_path) as monitor:
        for row in (None, train_row(1, loss=None, comm="?", slowest_rank=None), train_row(2, tokens=None, mfu=None)):
            if row is not None:
                write(tmp_path, row)
            monitor.poll()
            console.print(monitor.frame(80, 24))
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    assert "No step is made yet" in text
    assert "step 2\n" in re.sub(" +\n", "\n", text), "how many there will be is not known"


def test_following_a_file_that_grows_and_is_replaced(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    path = tmp_path / "metrics.jsonl"
    follower = Follower(path)
    request.addfinalizer(follower.close)
    assert follower.poll() == ([], False)
    assert follower.written_at() is None
    lines = [json.dumps({"kind": "train", "step": step}).encode() + b"\n" for step in range(4)]

    def steps() -> list[int]:
        return [row["step"] for row in follower.poll()[0]]

    path.write_bytes(lines[0] + lines[1][:7])
    assert follower.poll() == ([{"kind": "train", "step": 0}], True)
    assert steps() == [], "a line without its end"
    with path.open("ab") as file:
        file.write(lines[1][7:] + lines[2])
    assert steps() == [1, 2]
    with path.open("ab") as file:  # what a broken disk leaves
        file.write(b'{"kind": "train", "st\n\xff\xfe\n[1]\n{"kind": 3, "step": 1}\n{"kind": "x", "step": 1e400}\n')
        file.write(b"[" * 100_000 + b"\n" + lines[3])
    assert steps() == [3]
    assert follower.damaged == 6
    # A resumed run writes what is left to another file of that name, here no shorter than before.
    path.with_suffix(".partial").write_bytes(path.read_bytes())
    os.replace(path.with_suffix(".partial"), path)
    rows, another = follower.poll()
    assert another
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    path.write_bytes(lines[0])
    assert follower.poll() == ([{"kind": "train", "step": 0}], True), "the same file cut short"
    path.unlink()
    assert follower.poll() == ([], False)


def test_a_resumed_run_is_shown_from_its_checkpoint(run: Path, request: pytest.FixtureRequest) -> None:
    monitor = Monitor(run)
    request.addfinalizer(monitor.follower.close)
    monitor.poll()
    assert (monitor.state.step, monitor.state.skipped) == (20, 1)
    kept = (run / "metrics.jsonl").read_text().splitlines(keepends=True)[:6]
    (run / "partial").write_text("".join(kept))
    os.replace(run / "partial", run / "metrics.jsonl")
    save_config(load_config(None, ["train.steps=80"]), run / "config.yaml")
    monitor.poll()
    assert (monitor.state.step, monitor.state.skipped, len(monitor.state.losses)) == (5, 0, 5)
    assert monitor.state.plan.total_steps == 80


def test_text_from_files_does_not_drive_the_terminal(run: Path, shown: Callable[..., str]) -> None:
    evil = "\x1b[2J\x07[bold]x[/]\n"
    write(run, {"kind": "validation", "step": 20, "source": evil, "loss": 2.0})
    write(run, {"kind": evil, "step": 20}, {"kind": "evaluation", "step": 20, "task": evil, "length": 5})
    write(run, {"kind": "stage", "step": 20, "name": evil}, {"kind": "data", "step": 20, "epochs": {evil: 1}})
    text = shown(200)
    assert "\x1b" not in text
    assert "\x07" not in text
    assert "[bold]x[/]" in text, "shown as it is"


def dots(lines: list[str]) -> set[tuple[int, int]]:
    """Column from the left, row from the bottom: decoded as the Unicode standard numbers the dots of a cell."""
    places = {1: (0, 0), 2: (0, 1), 3: (0, 2), 7: (0, 3), 4: (1, 0), 5: (1, 1), 6: (1, 2), 8: (1, 3)}
    found = set()
    for row, line in enumerate(lines):
        for column, character in enumerate(line):
            for dot, (x, y) in places.items():
                if ord(character) - 0x2800 >> (dot - 1) & 1:
                    found.add((2 * column + x, 4 * len(lines) - 1 - (4 * row + y)))
    return found


def test_the_plot_is_where_the_points_are() -> None:
    lines, lowest, highest = braille([(x, float(x)) for x in range(8)], width=4, height=2)
    assert [len(line) for line in lines] == [4, 4]
    assert (lowest, highest) == (0.0, 7.0)
    assert dots(lines) == {(x, x) for x in range(8)}
    lines, *_ = braille([(x, 9.0 if x == 500 else 1.0) for x in range(1001)], width=5, height=3)
    spike = {y for x, y in dots(lines) if x == 5}
    assert spike == set(range(12)), "one step of a thousand, whole"
    assert {y for x, y in dots(lines) if x != 5} == {0}
    for points in ([(3, 2.0)], [(1, 2.0), (9, 2.0)]):  # nothing to scale by
        lines, *_ = braille(points, width=3, height=1)
        assert dots(lines) == {(x, 2) for x in range(6)}
    lines, *_ = braille([(0, 0.0), (100, 100.0)], width=4, height=2)  # a straight line between two points
    assert {x for x, _ in dots(lines)} == set(range(8))
    assert all(abs(x - y) <= 1 for x, y in dots(lines))
    with pytest.raises(ValueError, match="no points"):
        braille([], 4, 2)
    assert blocks([5.0, 1.0, 2.0, 8.0], 3) == "▁▂█"
    assert blocks([], 3) == ""


def test_durations() -> None:
    seconds = (0.4, 59, 60, 3725, 90_000, 8_640_000)
    assert [duration(s) for s in seconds] == ["0 s", "59 s", "1 min 0 s", "1 h 2 min", "1 d 1 h", "100 d 0 h"]


def test_the_tool(run: Path) -> None:
    shown = subprocess.run([sys.executable, str(TOOL), str(run), "--once"], capture_output=True, text=True, timeout=60)
    assert shown.returncode == 0, shown.stderr
    assert "step 20 of 50" in shown.stdout
    # Without --once it follows the run until that is finished.
    follow = subprocess.Popen(
        [sys.executable, str(TOOL), str(run), "--interval", "0.05"], stdout=subprocess.PIPE, text=True
    )
    write(run, train_row(STEPS), {"kind": "checkpoint", "step": STEPS, "bytes": 1, "stall_s": 0.0, "seconds": 0.0})
    output, _ = follow.communicate(timeout=60)
    assert follow.returncode == 0
    assert "finished" in output
