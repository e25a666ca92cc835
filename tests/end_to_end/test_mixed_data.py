"""Training on several sources at once: long and short text, and conversations, from files a user has."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.command_line import ROOT, arguments, run_alone, train_rows

from megazebra.train.metrics import read_metrics


@pytest.fixture(scope="module")
def chats(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 short conversations, encoded with the text corpus's tokenizer."""
    folder = tmp_path_factory.mktemp("chats")
    with open(folder / "chats.jsonl", "w") as file:
        for n in range(200):
            turns = [("user", f"What is {n} + {n}?"), ("assistant", f"{2 * n}.")] * (1 + n % 2)
            file.write(json.dumps({"messages": [{"role": role, "content": text} for role, text in turns]}) + "\n")
    subprocess.run(
        [
            sys.executable, str(ROOT / "tools" / "preprocess_data.py"), "--input", str(folder / "chats.jsonl"),
            "--output", str(folder / "out"), "--tokenizer", str(corpus / "tokenizer.json"),
            "--chat-template", "alpaca", "--validation-share", "0.1",
        ],
        check=True,
        capture_output=True,
    )  # fmt: skip
    return folder / "out"


def mixture(corpus: Path, chats: Path, run_dir: Path, chat_weight: float, *more: str) -> list[str]:
    sources = {
        "long": {"path": f"{corpus}/train", "weight": 0.5, "min_document_tokens": 4000},
        "text": {"path": f"{corpus}/train", "weight": 0.25},
        "chats": {"path": f"{chats}/train", "weight": chat_weight},
    }
    held_out = {"text": f"{corpus}/validation", "chats": f"{chats}/validation"}
    return arguments(
        corpus, run_dir, "--data.path=null", "--data.validation_path=null", "--data.overlong=truncate",
        f"--data.sources={json.dumps(sources)}", f"--data.validation_sources={json.dumps(held_out)}",
        "--data.packing=best_fit", "--train.steps=4", "--train.global_batch_size=8", "--validation.interval=2", *more,
    )  # fmt: skip


def test_a_mixture_trains_and_reports_every_source(corpus: Path, chats: Path, tmp_path: Path) -> None:
    first = run_alone(*mixture(corpus, chats, tmp_path, 0.25))
    assert first.returncode == 0, first.stderr
    for source, share in (("long", "50.0%"), ("text", "25.0%"), ("chats", "25.0%")):
        assert re.search(
            rf"{source}: {share} of the samples, [\d.]+ epochs of [\d,]+ tokens in [\d,]+ \w+", first.stdout
        )
    rows = read_metrics(tmp_path / "metrics.jsonl")
    (epochs,) = [row["epochs"] for row in rows if row["kind"] == "data"]
    assert epochs["long"] > epochs["text"] > 0, "the long documents are fewer, and drawn more often"
    assert epochs["chats"] > 0
    validation = [row for row in rows if row["kind"] == "validation"]
    assert [(row["step"], row["source"]) for row in validation] == [
        (2, "text"),
        (2, "chats"),
        (4, "text"),
        (4, "chats"),
    ]
    assert re.search(r"validation loss +\d\.\d+  text  \(the bar to beat, a unigram model: \d", first.stdout)
    assert re.search(r"validation loss +\d\.\d+  chats", first.stdout)
    # Another share is other data; the same mixture goes on.
    other = run_alone(*mixture(corpus, chats, tmp_path, 0.5, "--train.steps=6"))
    assert other.returncode == 2
    assert re.search(r"the training data's sources\.chats\.weight: 0\.25 there, 0\.5 here", other.stderr), other.stderr
    resumed = run_alone(*mixture(corpus, chats, tmp_path, 0.25, "--train.steps=6"))
    assert resumed.returncode == 0, resumed.stderr
    assert [row["step"] for row in train_rows(tmp_path)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
def test_megatrons_order_trains(corpus: Path, tmp_path: Path) -> None:
    result = run_alone(*arguments(corpus, tmp_path, "--data.index_compat=megatron", "--train.steps=2"))
    assert result.returncode == 0, result.stderr
    # Its order depends on the run's length, so a longer run would not go on where this one stopped.
    longer = run_alone(*arguments(corpus, tmp_path, "--data.index_compat=megatron", "--train.steps=4"))
    assert longer.returncode == 2
    assert "the training data's order.samples: 8 there, 16 here" in longer.stderr
