"""Rows in and out of evaluation.json, as a table, and as pictures."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from support.command_line import ROOT

from megazebra.errors import UserError
from megazebra.evaluate.charts import draw_all
from megazebra.evaluate.results import COLUMNS, Row, load_results, save_results, table

ROWS = [
    Row(
        task="positions", length=1024, start=0, end=16, samples=2, tokens=32, loss=2.5, perplexity=12.2,
        token_accuracy=0.25,
    ),
    Row(
        task="positions", length=1024, start=16, end=1024, samples=2, tokens=2016, loss=1.5, perplexity=4.5,
        token_accuracy=0.5,
    ),
    Row(task="contexts", length=160, start=31, end=159, samples=2, tokens=256, loss=3.0, token_accuracy=0.1),
    Row(task="contexts", length=128, start=0, end=127, samples=2, tokens=256, loss=4.0, token_accuracy=0.1),
    Row(task="passkey", length=1000, depth=0.5, samples=4, tokens=16, loss=0.5, token_accuracy=0.75, exact_match=0.5),
    Row(task="passkey", length=2048, depth=0.0, samples=4, tokens=16, loss=0.5, token_accuracy=1.0, exact_match=1.0),
    Row(task="needle_single", length=512, samples=4, tokens=16, loss=0.5, token_accuracy=0.75, exact_match=0.5),
]  # fmt: skip


def test_rows_survive_the_file(tmp_path: Path) -> None:
    path = tmp_path / "evaluation.json"
    save_results(path, ROWS, {"model": "runs/zebra", "seed": 3})
    assert load_results(path) == (ROWS, {"model": "runs/zebra", "seed": 3})
    content = json.loads(path.read_text())
    assert content["columns"] == COLUMNS
    assert all(row.keys() == COLUMNS.keys() for row in content["rows"]), "every column is explained"


def test_what_is_not_a_number_is_null(tmp_path: Path) -> None:
    path = tmp_path / "evaluation.json"
    save_results(path, [Row(task="kv", length=8, samples=1, tokens=1, loss=math.nan, token_accuracy=0.0)], {})
    assert "NaN" not in path.read_text()
    assert load_results(path)[0][0].loss is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "is no evaluation"),
        ("{", "is no evaluation"),
        ('{"format": 1, "columns": {}, "rows": [{"task": "kv"}]}', "is no evaluation"),
        ('{"format": 2, "columns": {}, "rows": []}', "has format 2, this version reads 1"),
    ],
)
def test_what_is_no_evaluation_is_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "evaluation.json").write_text(content)
    with pytest.raises(UserError, match=message):
        load_results(tmp_path / "evaluation.json")


def test_a_table_has_the_columns_that_are_filled() -> None:
    assert list(table(ROWS[4:6])) == [
        "task     length  depth  samples  tokens    loss  token accuracy  exact match",
        "passkey   1,000    50%        4      16  0.5000           75.0%        50.0%",
        "passkey   2,048     0%        4      16  0.5000          100.0%       100.0%",
    ]


def test_every_task_has_its_picture(tmp_path: Path) -> None:
    paths = draw_all(ROWS, tmp_path)
    assert [path.name for path in paths] == ["positions.png", "contexts.png", "passkey.png", "ruler.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
    assert len({path.read_bytes() for path in paths}) == 4
    assert sorted(tmp_path.iterdir()) == sorted(paths)


def test_planning_loads_no_torch() -> None:
    """Mistakes in what is asked for should show at once."""
    code = "import sys, megazebra.evaluate.plan; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
