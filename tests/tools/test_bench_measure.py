"""What the benches share: turns, medians, memory, the file of numbers."""

from __future__ import annotations

import json
import mmap
from collections.abc import Callable
from pathlib import Path

import pytest
from bench.measure import interleaved, peak_bytes, report

MIB = 2**20


def test_sides_take_turns_and_the_first_does_not_count() -> None:
    calls: list[str] = []
    took = iter([100.0, 200.0, 1.0, 20.0, 3.0, 10.0, 2.0, 90.0])  # the warm-up of both, then three rounds

    def clock(run: Callable[[], object]) -> float:
        run()
        return next(took)

    sides = {"ours": lambda: calls.append("ours"), "theirs": lambda: calls.append("theirs")}
    assert interleaved(sides, 3, clock) == {"ours": 2.0, "theirs": 20.0}
    assert calls == ["ours", "theirs"] * 4


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux counts peaks there")
def test_peak_counts_what_is_gone_again() -> None:
    # Straight from the system: what malloc keeps of what was freed depends on the tests before.
    def touched(mib: int) -> mmap.mmap:
        memory = mmap.mmap(-1, mib * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        for _ in range(mib):
            memory.write(one_mib)
        return memory

    one_mib = b"x" * MIB

    touched(300).close()  # a peak before the call is not the call's
    kept: list[mmap.mmap] = []

    def run() -> None:
        kept.append(touched(20))
        for _ in range(2):
            touched(60).close()

    assert 79 * MIB < peak_bytes(run) < 85 * MIB


def test_report_writes_one_flat_object(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    benches = {"first": lambda: [("a", 1, "one")], "second": lambda: [("b", 2.5, "two and a half")]}
    report(benches, None, str(tmp_path / "all.json"))
    assert json.loads((tmp_path / "all.json").read_text()) == {"a": 1.0, "b": 2.5}
    assert "two and a half" in capsys.readouterr().out
    report(benches, ["second"], str(tmp_path / "one.json"))
    assert json.loads((tmp_path / "one.json").read_text()) == {"b": 2.5}
