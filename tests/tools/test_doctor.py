"""The receptive-field test as a user starts it; what it finds and doesn't is in tests/models."""

from __future__ import annotations

import re
import subprocess
import sys

from support.command_line import ROOT, environment, run_alone

TOOL = str(ROOT / "tools" / "doctor.py")
# No data are named: none are read.
SETTINGS = [
    "--model.num_layers=4", "--model.hidden_size=128", "--model.num_attention_heads=4", "--model.num_kv_heads=2",
    "--model.window=16", "--data.seq_len=63", "--train.precision=fp32", "--train.attention_backend=blocked",
]  # fmt: skip
BROKEN_KERNEL = f"""
import runpy
from dataclasses import replace
from megazebra.attention import blocked
honest = blocked.attend
blocked.attend = lambda q, k, v, *, spec, **more: honest(q, k, v, spec=replace(spec, window=None), **more)
runpy.run_path({TOOL!r}, run_name="__main__")
"""


def test_one_process_that_is_well() -> None:
    run = run_alone(TOOL, *SETTINGS)
    assert run.returncode == 0, run.stderr
    rows = re.findall(r"^(\d) (global|local 16) +- +blocked +(\d+) +(\d+) +ok +ok$", run.stdout, re.MULTILINE)
    assert [row[:2] for row in rows] == [("1", "global"), ("3", "local 16")]
    assert all(int(tokens) >= 12 and int(queries) >= 12 for _, _, tokens, queries in rows)
    assert "dp 1 x cp 1 x tp 1, sequence parallel off, fp32, 1 x 63 tokens, documents masked, cpu" in run.stdout
    assert "every query sees exactly the keys that it should" in run.stdout


def test_a_broken_kernel_ends_it_with_1() -> None:
    run = subprocess.run(
        [sys.executable, "-c", BROKEN_KERNEL, *SETTINGS], env=environment(), cwd=ROOT, capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip
    assert run.returncode == 1, run.stderr
    assert re.search(r"^1 global .* ok +ok$", run.stdout, re.MULTILINE)
    assert re.search(r"^3 local 16 .* LEAK +LEAK$", run.stdout, re.MULTILINE)
    distances = re.findall(r"^LEAK: query (\d+) sees token (\d+), which is (\d+) away \(window 16\)", run.stdout, re.M)
    assert distances
    assert all(int(query) - int(token) == int(distance) >= 16 for query, token, distance in distances)
    assert "every query sees" not in run.stdout
    assert "Traceback" not in run.stderr


def test_a_mistake_in_the_configuration_is_a_message() -> None:
    run = run_alone(TOOL, *SETTINGS, "--parallel.context=2")
    assert run.returncode == 2
    assert "world size 1 is not divisible by parallel.tensor * parallel.context = 2" in run.stderr
    assert "Traceback" not in run.stderr
