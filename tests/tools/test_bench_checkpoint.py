"""The bench gives its keys, its ratios are those of the seconds and bytes it prints, and nothing is left behind."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import bench_checkpoint
import pytest
from bench_checkpoint import stalled_seconds

TOOL = Path(__file__).parents[2] / "tools" / "bench_checkpoint.py"
SIDES = ("save", "load", "load_cached")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read from /proc")
def test_the_program(tmp_path: Path) -> None:
    folder, target = tmp_path / "files", tmp_path / "numbers.json"
    folder.mkdir()
    sizes = ["--hidden=256", "--vocab=16384", "--rounds=1"]
    subprocess.run([sys.executable, str(TOOL), *sizes, f"--dir={folder}", f"--json={target}"], check=True)
    numbers = json.loads(target.read_text())
    for side in SIDES:
        assert numbers.pop(f"{side}_vs_cp") == numbers.pop(f"{side}_cp_s") / numbers.pop(f"{side}_s")
    assert numbers.pop("async_stall_vs_sync") == numbers.pop("stall_sync_s") / numbers.pop("stall_async_s")
    largest = numbers.pop("merge_largest_bytes")
    assert largest == 16384 * 256 * 4
    assert numbers.pop("load_peak_bytes") >= 0
    peak = numbers.pop("merge_peak_bytes")
    assert peak > largest
    assert numbers == {"merge_peak_over_largest": peak / largest}
    assert not list(folder.iterdir())


class Slow:
    """Takes 1 s to save, and is complete at the third time of asking, which takes 0.25 s each."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.asked = 0.0, 0
        clock = SimpleNamespace(perf_counter=lambda: self.now, sleep=self.pass_by)
        monkeypatch.setattr(bench_checkpoint, "time", clock)

    def pass_by(self, seconds: float) -> None:
        self.now += seconds

    def save(self, progress: object) -> list[str]:
        self.pass_by(1)
        return []

    def completed(self) -> list[str]:
        self.pass_by(0.25)
        self.asked += 1
        return ["saving"] if self.asked == 3 else []


def test_steps_between_are_no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    assert stalled_seconds(Slow(monkeypatch)) == pytest.approx(1 + 3 * 0.25)
