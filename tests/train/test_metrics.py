"""The record of a run, and what a person sees of it."""

from __future__ import annotations

import errno
import json
import math
from pathlib import Path

import pytest
import torch

from megazebra.config import Config
from megazebra.train.console import Console
from megazebra.train.metrics import MetricsFile, peak_memory_bytes, read_metrics
from megazebra.train.plot import plot_loss
from megazebra.train.trackers import Trackers, check_trackers, numbers_of

ROW = {
    "kind": "train", "step": 1, "tokens": 64, "loss": 2.5, "grad_norm": 1.0, "lr": 1e-3, "step_time_s": 0.5,
    "tokens_per_s": 128.0, "flops_per_s": 3e9, "mfu": None,
}  # fmt: skip


def write(path: Path, steps: range, resumed_step: int = 0) -> None:
    metrics = MetricsFile(path, resumed_step)
    for step in steps:
        metrics.write({**ROW, "step": step, "tokens": 64 * step, "loss": 3.0 / step})
        if step % 2 == 0:
            metrics.write({"kind": "validation", "step": step, "source": "", "loss": 3.1 / step, "seconds": 0.1})
    metrics.close()


def test_resuming_drops_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 8))
    write(path, range(5, 7), resumed_step=4)
    assert [row["step"] for row in read_metrics(path) if row["kind"] == "train"] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in read_metrics(path) if row["kind"] == "validation"] == [2, 4, 6]


def test_a_line_cut_short_by_a_kill_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 3))
    path.write_text(path.read_text() + '{"kind": "train", "step": 3, "lo')
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 2]
    write(path, range(3, 4), resumed_step=2)
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 2, 3]


@pytest.mark.parametrize("line", [b"[1]", b'{"step": 3}', b'{"kind": "train", "step": "3"}', b"\xff", b"[" * 100_000])
def test_reading_ends_at_a_line_that_is_no_row(line: bytes, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 2))
    path.write_bytes(path.read_bytes() + line + b"\n")
    assert [row["step"] for row in read_metrics(path)] == [1]


def test_rows_are_json_whatever_the_loss(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsFile(path)
    metrics.write({**ROW, "loss": math.nan, "grad_norm": math.inf, "skipped": "loss is nan"})
    (line,) = path.read_text().splitlines()  # on disk before the file is closed
    row = json.loads(line, parse_constant=lambda constant: pytest.fail(f"{constant} is no JSON"))
    assert row["loss"] is None
    assert row["skipped"] == "loss is nan"
    metrics.close()


def test_the_plot_is_a_picture_of_both_losses(tmp_path: Path) -> None:
    write(tmp_path / "metrics.jsonl", range(1, 9))
    plot_loss(tmp_path / "metrics.jsonl", tmp_path / "loss.png", unigram={"": 2.0})
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["loss.png", "metrics.jsonl"]


def test_lines_come_at_the_interval_and_skips_always(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console("lines", interval=5, first_step=0, total_steps=12)
    for step in range(1, 13):
        row = {**ROW, "step": step}
        console.step({**row, "skipped": "loss is nan", "samples": "samples 8 to 11"} if step == 3 else row)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("/")[0] for line in lines if "/12" in line] == ["step  1", "step  5", "step 10", "step 12"]
    assert "step 3: update skipped, loss is nan (samples 8 to 11)" in lines


def test_a_bar_shows_loss_and_speed(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console("bar", interval=1, first_step=0, total_steps=2)
    console.step(ROW)
    console.message("step 1: validation loss 2.4")
    console.step({**ROW, "step": 2})
    console.close()
    out = capsys.readouterr().out
    assert "2/2" in out
    assert "loss 2.500, 128 tok/s" in out
    assert "step 1: validation loss 2.4\n" in out


def test_peak_memory_is_at_least_what_is_held() -> None:
    held = torch.ones(30_000_000)
    assert peak_memory_bytes(torch.device("cpu")) >= held.nbytes


@pytest.mark.parametrize("package", ["tensorboard", "wandb"])
def test_an_absent_tracker_names_its_extra(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    value: object = True if package == "tensorboard" else {"enabled": True}
    config = Config.model_validate({"logging": {package: value}})
    with pytest.raises(ValueError, match=rf"logging.{package}.*pip install 'megazebra\[{package}\]'"):
        check_trackers(config)
    check_trackers(Config())


def test_a_tracker_that_fails_is_dropped_and_training_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    class Failing:
        def log(self, row: dict[str, object]) -> None:
            raise ConnectionError("no route")

        def close(self, failed: bool) -> None:
            raise AssertionError("a dropped tracker is not asked again")

    seen: list[object] = []

    class Working:
        def log(self, row: dict[str, object]) -> None:
            seen.append(row["step"])

        def close(self, failed: bool) -> None: ...

    trackers = Trackers([Failing(), Working()])
    trackers.log(ROW)
    trackers.log({**ROW, "step": 2})
    trackers.close()
    assert seen == [1, 2]
    assert capsys.readouterr().out == "Failing is switched off after ConnectionError: no route\n"


def test_charts_are_named_by_what_tells_rows_apart() -> None:
    evaluation = {"kind": "evaluation", "step": 3, "task": "passkey", "length": 512, "depth": 0.5, "start": None}
    assert numbers_of({**evaluation, "loss": 1.5, "exact_match": None}) == {"evaluation/passkey/512/0.5/loss": 1.5}
    assert numbers_of({"kind": "validation", "step": 3, "source": "code", "loss": 2}) == {"validation/code/loss": 2}
    assert numbers_of({"kind": "validation", "step": 3, "source": "", "loss": 2}) == {"validation/loss": 2}
    assert numbers_of({"kind": "data", "step": 3, "epochs": {"code": 0.5}}) == {"data/epochs/code": 0.5}


class FullDisk:
    def write(self, line: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    metrics.close()
    monkeypatch.setattr(metrics, "_file", FullDisk())
    with pytest.raises(OSError, match=r"No space left on device: '.*metrics.jsonl'"):
        metrics.write(ROW)
