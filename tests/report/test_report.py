"""The report page: it parses, stands alone, and shows the numbers of the run."""

from __future__ import annotations

import base64
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from megazebra.config import load_config, save_config
from megazebra.errors import UserError
from megazebra.report.charts import MOST_POINTS, curves, thinned
from megazebra.report.evaluations import Evaluation
from megazebra.report.page import page
from megazebra.report.run import Run

TOOL = Path(__file__).parents[2] / "tools" / "report.py"
VOID = {"meta", "img", "br"}
STEPS = 40
PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


class Page(HTMLParser):
    """Checks that elements are closed in order; collects tables as rows of cells, ids, and what is referred to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.tags: set[str] = set()
        self.text = ""
        self.styles = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attrs:
            assert not name.startswith("on"), "a script in an attribute"
            if name == "style":
                self.styles += value or ""
            if name == "id":
                self.ids.append(value or "")
            if name in ("href", "src", "xlink:href", "action", "data"):
                self.references.append(value or "")
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.open and self.open[-1] == "style":
            self.styles += data
        if self.open and self.open[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data

    def table(self, first_column: str) -> list[list[str]]:
        (found,) = [table[1:] for table in self.tables if table[0][0] == first_column]
        return found

    def fact(self, name: str) -> str:
        (found,) = [row[1] for table in self.tables for row in table if len(row) == 2 and row[0] == name]
        return found


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder of forty steps in two stages, one step skipped."""
    folder = tmp_path_factory.mktemp("runs") / "run <1> & co"
    folder.mkdir()
    config = load_config(None, [f"train.steps={STEPS}", "model.window=77", "optimizer.lr=0.002", "model.num_layers=4"])
    save_config(config, folder / "config.yaml")
    rows: list[dict] = [{"kind": "stage", "step": 0, "name": "short", "seq_len": 512}]
    for step in range(1, STEPS + 1):
        row = {
            "kind": "train", "step": step, "tokens": 4096 * step, "loss": 8.0 - step / 10, "grad_norm": 1.5,
            "lr": 0.002, "step_time_s": 0.5, "data_wait_s": 0.05, "tokens_per_s": 8192.0, "flops_per_s": 3e9,
            "mfu": None, "comm_bytes": 1000 + step, "comm": {"dp.all_reduce": {"calls": 2, "bytes": 1000 + step}},
            "peak_memory_bytes": 5_000_000 + step,
        }  # fmt: skip
        if step == 9:
            row |= {"skipped": "loss is nan <script>alert(1)</script>", "samples": "samples 32 to 35", "loss": None}
        rows.append(row)
        if step == 20:
            rows.append({"kind": "stage", "step": 20, "name": "long $x$ <b>", "seq_len": 2048})
        if step % 20 == 0:
            rows.append({"kind": "validation", "step": step, "source": "books", "loss": 7.25 - step / 100})
            rows.append(
                {
                    "kind": "evaluation", "step": step, "task": "kv", "length": 256, "depth": 0.5, "start": None,
                    "samples": 8, "loss": 2.5, "exact_match": step / 80,
                }
            )  # fmt: skip
            rows.append({"kind": "data", "step": step, "epochs": {"web": step / 400}})
            rows.append({"kind": "checkpoint", "step": step, "bytes": 12_000_000, "stall_s": 0.25, "seconds": 1.5})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"kind": "tra')
    checkpoint = folder / "checkpoints" / "step_00000040"
    checkpoint.mkdir(parents=True)
    index = {"versions": {"torch": "9.9"}, "layout": {"tensor": 2, "zero_stage": 3}}
    (checkpoint / "index.json").write_text(json.dumps(index))
    (folder / "checkpoints" / "latest").write_text("step_00000040\n")
    return folder


def evaluation(folder: Path, **more: object) -> Path:
    folder.mkdir()
    rows = [
        {"task": "passkey", "length": 1024, "depth": depth, "samples": 20, "loss": 0.5, "exact_match": 0.8125}
        for depth in (0.0, 1.0)
    ]
    rows.append({"task": "positions", "length": 1024, "depth": None, "samples": 20, "loss": 3.125, "exact_match": None})
    content = {"format": 1, "model": "runs/<x>", "columns": {"task": "what was asked"}, "rows": rows, **more}
    (folder / "evaluation.json").write_text(json.dumps(content))
    (folder / "passkey.png").write_bytes(PIXEL)
    return folder


@pytest.fixture(scope="module")
def text(run: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page of `run` with an evaluation."""
    results = evaluation(tmp_path_factory.mktemp("results") / "evaluation")
    return page(Run.open(run), [Evaluation.open(results)])


def test_the_page_stands_alone_and_escapes_what_it_shows(text: str) -> None:
    parsed = Page(text)
    assert "script" not in parsed.tags
    assert "loss is nan <script>alert(1)</script>" in parsed.text
    assert "run <1> & co" in parsed.text
    assert all(reference.startswith(("#", "data:image/png;base64,")) for reference in parsed.references)
    assert {reference[1:] for reference in parsed.references if reference.startswith("#")} <= set(parsed.ids)
    assert len(parsed.ids) == len(set(parsed.ids))
    assert not re.search(r"url\((?!#)|@import", parsed.styles)
    assert "1 lines of metrics.jsonl are damaged" in parsed.text


def test_the_numbers_are_those_of_the_run(run: Path, text: str) -> None:
    parsed = Page(text)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()[:-1]]
    last = [row for row in rows if row["kind"] == "train"][-4:]
    assert parsed.fact("steps") == "40 of 40"
    assert parsed.fact("tokens") == f"{4096 * STEPS:,}"
    mean = sum(row["loss"] for row in last[1:]) / 3  # a tenth of the 39 that have a loss
    assert parsed.fact("training loss") == f"{mean:.4f} (mean of the last 3 steps; began at 7.9000)"
    assert parsed.fact("validation loss books") == "6.85 (step 40)"
    assert parsed.fact("time in steps") == "20.0 s"
    assert parsed.fact("waited for data") == "10.0% of the time"
    assert parsed.fact("peak memory") == "5 MB"
    assert parsed.fact("received per step") == "1.02 kB by rank 0 (median)"
    assert parsed.fact("skipped updates") == "1"
    validation, skipped, checkpoints = (
        [table for table in parsed.tables if table[0] == columns]
        for columns in (
            ["step", "loss books"],
            ["step", "why", "samples"],
            ["step", "size", "training stood still (s)", "until complete (s)", "state"],
        )
    )
    assert validation[0][1:] == [["20", "7.05"], ["40", "6.85"]]
    assert skipped[0][1:] == [["9", "loss is nan <script>alert(1)</script>", "samples 32 to 35"]]
    assert checkpoints[0][1:] == [
        ["20", "12 MB", "0.25", "1.5", "deleted"],
        ["40", "12 MB", "0.25", "1.5", "on disk, latest"],
    ]
    (evaluated,) = (table for table in parsed.tables if table[0][:2] == ["step", "task"])
    assert evaluated == [
        ["step", "task", "length", "depth", "samples", "loss", "exact match"],
        ["20", "kv", "256", "0.5", "8", "2.5", "0.25"],
        ["40", "kv", "256", "0.5", "8", "2.5", "0.5"],
    ]
    assert "Evaluation while training" in parsed.text
    assert parsed.table("group and kind") == [["dp.all_reduce", "2", "1,020"]]
    assert parsed.table("source") == [["web", "0.1"]]
    assert parsed.table("not at its default") == [
        ["model.num_layers", "4", "32"],
        ["model.window", "77", "512"],
        ["train.steps", "40", "1000"],
        ["optimizer.lr", "0.002", "0.0003"],
    ]
    assert (parsed.fact("torch"), parsed.fact("layout: zero stage")) == ("9.9", "3")
    stages = [table for table in parsed.tables if table[0] == ["step", "name", "seq len"]]
    assert stages[0][1:] == [["0", "short", "512"], ["20", "long $x$ <b>", "2,048"]]
    passkey, positions = (table for table in parsed.tables if table[0][0] == "task" and len(table[0]) > 2)
    assert passkey == [
        ["task", "length", "depth", "samples", "loss", "exact match"],
        ["passkey", "1,024", "0", "20", "0.5", "0.8125"],
        ["passkey", "1,024", "1", "20", "0.5", "0.8125"],
    ]
    assert positions == [["task", "length", "samples", "loss"], ["positions", "1,024", "20", "3.125"]]


def test_unknown_parts_of_an_evaluation_are_shown(tmp_path: Path) -> None:
    folder = evaluation(
        tmp_path / "evaluation", speed=[{"batch": 4, "tokens per second": 12.5}], plan={"seed": {"a": 7}}
    )
    parsed = Page(Evaluation.open(folder / "evaluation.json").shown())
    assert parsed.table("batch") == [["4", "12.5"]]
    assert parsed.fact("plan.seed.a") == "7"


def test_only_pictures_that_an_evaluation_names_are_shown(tmp_path: Path) -> None:
    (tmp_path / "outside.png").write_bytes(PIXEL)
    named = ["passkey.png", "gone.png", "../outside.png", "evaluation.json", 7]
    for folder, more, shown in (("new", {"pictures": named}, ["passkey"]), ("before", {}, ["old", "passkey"])):
        results = evaluation(tmp_path / folder, **more)
        (results / "old.png").write_bytes(PIXEL)
        opened = Evaluation.open(results)
        assert sorted(opened.pictures) == shown
        assert "pictures" not in Page(opened.shown()).text


@pytest.mark.parametrize(
    ("content", "warning"),
    [("", "The run has not made a step yet."), ('{"kind": "train", "step": 1}\n', "The configuration cannot be shown")],
)
def test_a_page_is_made_of_what_there_is(tmp_path: Path, content: str, warning: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(content)
    (tmp_path / "config.yaml").write_text("model: {no_such_key: 1}\n")
    (tmp_path / "checkpoints" / "step_00000001").mkdir(parents=True)
    for name in ("latest", "step_00000001/index.json"):
        (tmp_path / "checkpoints" / name).write_bytes(b"\xff")
    assert warning in Page(page(Run.open(tmp_path), [])).text


def test_what_is_no_run_or_evaluation_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"metrics.jsonl cannot be read .*give the folder of a run"):
        Run.open(tmp_path)
    (tmp_path / "evaluation.json").write_text("[1]")
    with pytest.raises(UserError, match=r"is no evaluation \(no JSON object\); give the output folder"):
        Evaluation.open(tmp_path)


def test_thinned_curves_keep_their_spikes() -> None:
    points = [(float(step), 1000.0 if step == 77_777 else step % 7) for step in range(100_000)]
    kept = thinned(points)
    assert len(kept) <= MOST_POINTS
    assert (77_777.0, 1000.0) in kept
    assert kept == sorted(kept)
    assert thinned(points[:20]) == points[:20]


def test_a_chart_draws_its_points() -> None:
    svg = curves("Loss", "nats", {"one": [(0, 1.0), (10, 3.0), (20, 2.0)], "other": [(0, 3.0), (20, 1.0)]})
    drawn = {}
    for number in (0, 1):
        (path,) = re.findall(rf'<g id="loss-curve-{number}">\s*<path d="([^"]*)"', svg)
        drawn[number] = [tuple(map(float, place)) for place in re.findall(r"[ML] ([\d.]+) ([\d.]+)", path)]
    (left, low), (middle, high), (right, between) = drawn[0]
    assert drawn[1] == [(left, high), (right, low)]
    assert (middle, between) == (pytest.approx((left + right) / 2), pytest.approx((low + high) / 2))
    assert high < low  # y points down
    assert curves("Loss", "nats", {"each step": []}) == ""


def test_the_tool_writes_the_page_into_the_run(run: Path) -> None:
    done = subprocess.run([sys.executable, str(TOOL), str(run)], capture_output=True, text=True, check=True)
    assert f"wrote {run / 'report.html'}" in done.stdout
    # The same run gives the same page, in another process too.
    assert (run / "report.html").read_text() == page(Run.open(run), [])
    assert [path.name for path in run.glob("*report*")] == ["report.html"]
