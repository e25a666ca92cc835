"""Both sides of the generation bench are one model in the middle of one sequence, and the tool gives its keys."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bench_generate import STEPS, Setting, Side, bench_decode

TOOL = Path(__file__).parents[2] / "tools" / "bench_generate.py"
SMALL = Setting(
    context=1024, batch=2, layers=4, hidden=32, heads=2, kv_heads=1, window=16, vocab=97, pattern="GLLL", dtype="fp32"
)


def test_sides_differ_in_what_they_keep_alone() -> None:
    ours, full = Side(SMALL, STEPS), Side(replace(SMALL, pattern="G"), STEPS)
    weights = dict(full.model.named_parameters())
    assert all(torch.equal(weight, weights[name]) for name, weight in ours.model.named_parameters())
    for side in (ours, full):
        side.turn()
        assert side.cache.columns.end == SMALL.context + STEPS
    assert [layer.size for layer in ours.cache.layers] == [SMALL.context + STEPS, 16, 16, 16]
    assert [layer.size for layer in full.cache.layers] == [SMALL.context + STEPS] * 4


def test_keys_others_rely_on() -> None:
    numbers = {key: number for key, number, _ in bench_decode(SMALL, rounds=1)}
    sides = {f"{what}_{name}" for what in ("step_ms", "cache_bytes") for name in ("zebra", "full")}
    assert set(numbers) == sides | {"decode_vs_full_1k", "cache_bytes_vs_full"}
    assert numbers["decode_vs_full_1k"] == pytest.approx(numbers["step_ms_full"] / numbers["step_ms_zebra"])
    columns = SMALL.context + 2 * STEPS
    assert numbers["cache_bytes_vs_full"] == pytest.approx(4 * columns / (columns + 3 * 16))


def test_the_program_in_bf16(tmp_path: Path) -> None:
    target = tmp_path / "numbers.json"
    sizes = ["--layers=4", "--hidden=32", "--heads=2", "--window=16", "--vocab=97", "--rounds=1", "--threads=1"]
    subprocess.run(
        [sys.executable, str(TOOL), *sizes, "--dtype=bf16", f"--json={target}"], check=True, capture_output=True
    )
    assert {"decode_vs_full_16k", "cache_bytes_vs_full"} < set(json.loads(target.read_text()))
