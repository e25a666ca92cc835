"""tools/plan.py: the table, the recommendation, the file, messages; and its memory beside measured runs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from bench.plan_check import LAYOUTS, compare
from support.command_line import ROOT, run_alone

TOOL = str(ROOT / "tools" / "plan.py")
EXAMPLE = ["--config", str(ROOT / "examples" / "zebra_7b.yaml"), "--gpus", "16"]
# Few layouts, since this is about what is printed of them.
FEW = ["--train.recompute=selective", "--parallel.zero_stage=1", "--train.micro_batch_size=1"]


def test_table_recommendation_and_file(tmp_path: Path) -> None:
    path = tmp_path / "layouts.json"
    run = run_alone(TOOL, *EXAMPLE, *FEW, "--hardware", "h100", "--json", str(path))
    assert run.returncode == 0, run.stderr
    rows = json.loads(path.read_text())
    fitting = [row for row in rows if row["fits"]]
    assert fitting
    assert len(fitting) < len(rows)
    assert all(sum(row["memory_bytes"].values()) == 2 * row["memory_bytes"]["total"] for row in fitting)
    fastest = min(fitting, key=lambda row: row["step_s"]["total"])
    assert f"  {fastest['overrides']}\n" in run.stdout
    assert f"Recommended: {fastest['tokens_per_s']:,.0f} tokens/s" in run.stdout
    # A line for each layout that fits, and the amount that others lack.
    lines = re.findall(r"^ *(\d+) +(\d+) +(\d+) +1 +1 +selective ", run.stdout, re.MULTILINE)
    assert len(lines) == len(fitting)
    assert re.search(r"^ *1 +1 +16 +ZeRO 1 selective memory over by [\d.]+ GB$", run.stdout, re.MULTILINE)


def test_the_recommended_overrides_can_be_pasted() -> None:
    run = run_alone(TOOL, *EXAMPLE, *FEW)
    (overrides,) = re.findall(r"^  (--parallel\.tensor.*)$", run.stdout, re.MULTILINE)
    again = run_alone(TOOL, *EXAMPLE, *overrides.split())
    assert again.returncode == 0, again.stderr
    assert "1 of 1 layouts fit" in again.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--hardware", "h1000"], "there is no such profile; take one of a100, cpu, h100"),
        (["--gpus", "0"], "--gpus 0: must be at least 1"),
        (["--data.seqlen=5"], "did you mean 'data.seq_len'"),
    ],
)
def test_mistakes_are_messages(arguments: list[str], message: str) -> None:
    run = run_alone(TOOL, *arguments)
    assert run.returncode == 2
    assert message in run.stderr
    assert "Traceback" not in run.stderr


needs_linux = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux counts peaks there")


@needs_linux
def test_planned_memory_is_what_a_run_needs() -> None:
    (each,) = compare(["tp 2, sequence parallel, selective"], seq_len=1024)
    assert each.predicted == pytest.approx(each.measured, rel=0.1)


@needs_linux
@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_planned_memory_of_all_layouts(name: str) -> None:
    (each,) = compare([name])
    assert each.predicted == pytest.approx(each.measured, rel=0.1)
