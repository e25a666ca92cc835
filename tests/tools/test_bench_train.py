"""Both sides of the training bench are one model, and the tool gives its keys."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import bench_train
import pytest
from bench.train_sides import SIDES, Setting, peak_of_training

TOOL = Path(__file__).parents[2] / "tools" / "bench_train.py"
SMALL = Setting(
    seq_len=96, layers=4, hidden=32, heads=2, window=16, vocab=97, pattern="GLLL", dtype="fp32", threads=1,
    backend="blocked",
)  # fmt: skip


def test_sides_train_alike() -> None:
    sides = {name: make(SMALL) for name, make in SIDES.items()}
    losses = {name: [side.step() for _ in range(3)] for name, side in sides.items()}
    assert losses["ours"][-1] < losses["ours"][0]
    # Weights drift apart by rounding from the first update on.
    assert losses["ours"] == pytest.approx(losses["transformers"], rel=1e-5)
    # The same weights, but every layer sees everything.
    assert losses["full_pattern"][0] != pytest.approx(losses["ours"][0], rel=1e-5)


def test_another_model_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_train, "in_fresh_process", lambda function, *arguments: function(*arguments))
    monkeypatch.setitem(SIDES, "transformers", SIDES["full_pattern"])
    with pytest.raises(SystemExit, match="not the same model"):
        next(bench_train.bench_speed(SMALL, rounds=1))


def test_keys_others_rely_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_train, "in_fresh_process", lambda function, *arguments: function(*arguments))
    numbers = {key: number for bench in bench_train.BENCHES.values() for key, number, _ in bench(SMALL, 1)}
    ratios = {"vs_full_pattern", "vs_transformers", "peak_memory_vs_transformers"}
    assert set(numbers) == ratios | {f"{what}_{name}" for what in ("tokens_per_s", "peak_bytes") for name in SIDES}
    faster = numbers["tokens_per_s_ours"] / numbers["tokens_per_s_transformers"]
    assert numbers["vs_transformers"] == pytest.approx(faster)
    smaller = numbers["peak_bytes_transformers"] / numbers["peak_bytes_ours"]
    assert numbers["peak_memory_vs_transformers"] == pytest.approx(smaller)


def test_peak_memory_is_that_of_the_step() -> None:
    # Feed-forward activations alone, [S, 8/3 hidden] three times a layer in fp32, are more than this.
    longer = replace(SMALL, seq_len=4096, hidden=128)
    assert peak_of_training("ours", longer) > 4 * 3 * 4096 * 128 * 8 // 3 * 4


@pytest.mark.slow
def test_the_program_in_bf16(tmp_path: Path) -> None:
    target = tmp_path / "numbers.json"
    sizes = ["--seq-len=96", "--layers=4", "--hidden=32", "--heads=2", "--window=16", "--vocab=97", "--rounds=1"]
    options = ["--dtype=bf16", "--threads=1", "--backend=blocked", "--only=speed", f"--json={target}"]
    subprocess.run([sys.executable, str(TOOL), *sizes, *options], check=True, capture_output=True)
    wanted = {"vs_full_pattern", "vs_transformers"} | {f"tokens_per_s_{name}" for name in SIDES}
    assert set(json.loads(target.read_text())) == wanted
