"""tools/preprocess_data.py on conversations."""

from __future__ import annotations

import datetime
import json

import numpy as np
import pytest

from megazebra.data.corpus.indexed_corpus import Corpus
from megazebra.data.prepare.encoders.tokenizer import byte_tokenizer, save_tokenizer

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")


@pytest.fixture
def chat(tmp_path):
    """A tokenizer for chatml, and conversations as lines and as a table, the third of them long."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    (tmp_path / "model").mkdir()
    save_tokenizer(tokenizer, tmp_path / "model" / "tokenizer.json")
    rows = [
        {"messages": [{"role": "user", "content": "Q" * n}, {"role": "assistant", "content": f"answer {n}"}]}
        for n in (1, 2, 500)
    ]
    (tmp_path / "chat").mkdir()
    (tmp_path / "chat" / "a.jsonl").write_text("\n".join(map(json.dumps, [*rows, {"messages": []}])))
    dated = [{**row, "date": datetime.datetime(2025, 1, n + 1)} for n, row in enumerate(rows)]
    parquet.write_table(pyarrow.Table.from_pylist(dated), tmp_path / "chat" / "b.parquet")
    return ("--tokenizer", str(tmp_path / "model"), "--chat-template", "chatml")


def test_conversations(run, chat, tmp_path):
    limits = ("--max-tokens", "200", "--overlong", "drop")
    code, output = run("--input", tmp_path / "chat", "--validation-share", "0", *limits, tokenizer=chat)
    assert code == 0
    assert "longest conversation: 531 tokens; 2 longer than --max-tokens 200, dropped" in output
    assert "skipped 2, each because it is longer than 200 tokens, such as 'chat/a.jsonl:3'" in output
    assert "skipped 1, each because it has no messages in 'messages', such as 'chat/a.jsonl:4'" in output
    corpus = Corpus(tmp_path / "out" / "train")
    said = []
    for document in range(corpus.documents):
        ((start, stop),) = corpus.spans(document)
        said.append(bytes(corpus.read(document)[start : stop - 1].astype(np.uint8)).decode())
    assert said == ["answer 1", "answer 2"] * 2


@pytest.mark.parametrize(("overlong", "fate", "stays"), [("keep", "kept whole", 531), ("truncate", "truncated", 520)])
def test_overlong_conversations_are_counted_whatever_becomes_of_them(run, chat, tmp_path, overlong, fate, stays):
    request = ("--input", tmp_path / "chat", "--validation-share", "0.3", "--overlong", overlong, "--max-tokens", "520")
    output = run(*request, tokenizer=chat)[1]
    assert f"longest conversation: 531 tokens; 2 longer than --max-tokens 520, {fate}\n" in output
    assert f"longest conversation: {stays} tokens; " in run(*request, tokenizer=chat)[1]


def test_corpus_that_is_there_is_held_against_another_limit(run, chat, tmp_path):
    request = ("--input", tmp_path / "chat", "--validation-share", "0")
    assert "longest conversation: 531 tokens\n" in run(*request, tokenizer=chat)[1]
    output = run(*request, "--max-tokens", "30", tokenizer=chat)[1]
    assert "is up to date" in output
    assert "531 tokens; 4 longer than --max-tokens 30, kept whole\n" in output


def test_conversation_at_fault_is_named(run, chat, tmp_path):
    limits = ("--max-tokens", "200", "--overlong", "error")
    code, output = run("--input", tmp_path / "chat" / "a.jsonl", *limits, tokenizer=chat)
    assert (code, "error: a.jsonl:3: " in output) == (1, True)


def test_conversations_need_records_and_a_tokenizer(run, chat, texts, tmp_path):
    code, output = run("--input", texts, tokenizer=chat)
    assert (code, f"{texts}/00.txt holds no conversations" in output) == (1, True)
    learned = ("--chat-template", "chatml", "--train-tokenizer", "300")
    code, output = run("--input", tmp_path / "chat", tokenizer=learned)
    assert (code, "give one with --tokenizer" in output) == (1, True)
    code, output = run("--input", tmp_path / "chat", "--engine", "gigatoken", tokenizer=chat)
    assert (code, "leave out --engine gigatoken" in output) == (1, True)
    for limit in (("--max-tokens", "9"), ("--overlong", "drop")):
        code, output = run("--input", texts, *limit)
        assert (code, "--max-tokens and --overlong are for conversations" in output) == (1, True)
