"""tools/preprocess_data.py on files of records, conversations among them, and on directories."""

from __future__ import annotations

import datetime
import gzip
import importlib.util
import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megazebra.data.corpus.indexed_corpus import Corpus
from megazebra.data.errors import CorpusError
from megazebra.data.prepare import publish as publish_module
from megazebra.data.prepare.encode_task import Sizes
from megazebra.data.prepare.encoders import EncoderOptions
from megazebra.data.prepare.job import Preprocessing
from megazebra.data.prepare.preprocess import preprocess
from megazebra.data.prepare.tokenizer import byte_tokenizer, save_tokenizer

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")
zstandard = pytest.importorskip("zstandard")

TOOL = Path(__file__).parents[3] / "tools" / "preprocess_data.py"
specification = importlib.util.spec_from_file_location("preprocess_data_for_records", TOOL)
tool = importlib.util.module_from_spec(specification)
specification.loader.exec_module(tool)


def lines(*texts, key="text"):
    return b"".join(json.dumps({"meta": {"n": 1}, key: text}).encode() + b"\n" for text in texts)


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "a.jsonl").write_bytes(lines(*(f"a {n}" for n in range(30))))
    (folder / "b.txt").write_text("b")
    (folder / "c.jsonl.zst").write_bytes(zstandard.compress(lines(*(f"c {n}" for n in range(30)))))
    table = pyarrow.Table.from_pylist([{"text": f"d {n}", "other": n} for n in range(30)])
    parquet.write_table(table, folder / "d.parquet", row_group_size=10)
    return folder


@pytest.fixture
def run(tmp_path, capsys):
    def run_tool(*options, tokenizer=("--tokenizer", "bytes")):
        code = tool.main([*map(str, options), "--output", str(tmp_path / "out"), *tokenizer])
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    return run_tool


def documents(prefix, end=1):
    corpus = Corpus.open(prefix)
    corpus.verify()
    found = [corpus.read(i) for i in range(corpus.documents)]
    return [bytes(tokens[: len(tokens) - end].astype(np.uint8)).decode() for tokens in found]


EVERYTHING = [*(f"a {n}" for n in range(30)), "b", *(f"c {n}" for n in range(30)), *(f"d {n}" for n in range(30))]


def test_all_kinds_of_files_in_one_corpus(run, source, tmp_path):
    code, _ = run("--input", source, "--validation-share", "0.2")
    assert code == 0
    train, validation = (documents(tmp_path / "out" / name) for name in ("train", "validation"))
    assert sorted(train + validation) == sorted(EVERYTHING)
    assert train == [text for text in EVERYTHING if text in set(train)]
    assert 5 <= len(validation) <= 35
    assert "is up to date" in run("--input", source, "--validation-share", "0.2")[1]


def test_tokenizer_learns_from_records_and_texts(run, source, tmp_path):
    code, _ = run("--input", source, "--validation-share", "0", tokenizer=("--train-tokenizer", "300"))
    assert code == 0
    assert Corpus.open(tmp_path / "out" / "train").vocab_size > 257


def test_share_that_falls_on_no_record(run, source, tmp_path):
    code, output = run("--input", source, "--validation-share", "1e-9")
    assert (code, "holds out none of the documents; there is no validation corpus" in output) == (0, True)
    assert documents(tmp_path / "out" / "train") == EVERYTHING
    assert not (tmp_path / "out" / "validation.idx").exists()
    assert "is up to date" in run("--input", source, "--validation-share", "1e-9")[1]


def test_without_end_of_document(run, source, tmp_path):
    assert run("--input", source / "a.jsonl", "--no-eod", "--validation-share", "0")[0] == 0
    assert documents(tmp_path / "out" / "train", end=0) == EVERYTHING[:30]
    assert Corpus.open(tmp_path / "out" / "train").meta.eod_id is None
    code, output = run("--input", source / "a.jsonl", "--validation-share", "0")
    assert (code, "eod_id was None, is 256" in output) == (1, True)


def test_other_keys(run, tmp_path):
    rows = [{"body": {"raw": "x"}}, {"body": {"raw": "y"}}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    code, output = run("--input", tmp_path / "rows.jsonl")
    assert code == 1
    assert f"{tmp_path}/rows.jsonl:1: the record has no key 'text' (its keys: 'body'; see --text-key)" in output
    assert run("--input", tmp_path / "rows.jsonl", "--text-key", "body.raw", "--validation-share", "0")[0] == 0
    assert documents(tmp_path / "out" / "train") == ["x", "y"]


def test_directories_as_documents(run, tmp_path):
    for name, content in (("a/1", "one"), ("a/2", "two\n"), ("b/1", "three"), ("b/c/1", "four")):
        (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tree" / name).write_text(content)
    options = ("--input", tmp_path / "tree", "--validation-share", "0")
    assert run(*options, "--documents", "directory")[0] == 0
    assert documents(tmp_path / "out" / "train") == ["one\ntwo\n", "three", "four"]
    code, output = run(*options)
    assert (code, "documents was 'directory', is None" in output) == (1, True)


@pytest.fixture
def spoiled(source):
    content = lines(*(f"z {n}" for n in range(20))) + b"{\n" + lines("last")
    (source / "z.jsonl.gz").write_bytes(gzip.compress(content))
    return source


def small(source, output, **options):
    encoder = EncoderOptions(tokenizer="bytes")
    sizes = Sizes(task=10**6, part=100, batch=50, process=1)
    return Preprocessing(inputs=(str(source),), output=str(output), encoder=encoder, sizes=sizes, **options)


@pytest.mark.parametrize("workers", [1, 2])
def test_bad_record_ends_the_build_and_skipping_it_goes_on(spoiled, tmp_path, workers):
    job = small(spoiled, tmp_path / "out", workers=workers)
    with pytest.raises(CorpusError, match=rf"{spoiled}/z.jsonl.gz:21: the record is no JSON \(.*--skip-bad-records"):
        preprocess(job)
    begun = []
    report = preprocess(replace(job, skip_bad_records=True), progress=lambda done, *_: begun.append(done))
    assert begun[0] > 0
    assert report.skipped.lines() == ["skipped 1, each because it is no JSON, such as 'source/z.jsonl.gz:21'"]
    assert report.train.documents + report.validation.documents == len(EVERYTHING) + 21
    assert not (tmp_path / "out" / "parts").exists()


def test_parts_without_their_bad_records_are_no_parts_of_a_strict_build(spoiled, tmp_path, monkeypatch):
    job = small(spoiled, tmp_path / "out")

    def disk_full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(publish_module, "unigram_cross_entropy", disk_full)
    with pytest.raises(OSError, match="No space left"):
        preprocess(replace(job, skip_bad_records=True))
    with pytest.raises(CorpusError, match=r"z\.jsonl\.gz:21"):
        preprocess(job)


def test_parts_of_another_build_wait_until_this_one_is_done(source, tmp_path, monkeypatch):
    monkeypatch.setattr(publish_module, "unigram_cross_entropy", None)
    with pytest.raises(TypeError):
        preprocess(small(source, tmp_path / "out"))
    before = list((tmp_path / "out" / "parts").iterdir())
    said = []
    with pytest.raises(TypeError):
        preprocess(small(source, tmp_path / "out", validation_share=0.3), say=said.append)
    assert "parts of a build of other inputs or options" in said[0] + said[1]
    assert set(before) < set((tmp_path / "out" / "parts").iterdir())
    monkeypatch.undo()
    begun = []
    preprocess(small(source, tmp_path / "out"), progress=lambda done, *_: begun.append(done))
    assert len(begun) == 1  # nothing was left to encode
    assert not (tmp_path / "out" / "parts").exists()


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
    assert "skipped 2, each because it is longer than 200 tokens, such as 'chat/a.jsonl:3'" in output
    assert "skipped 1, each because it has no messages in 'messages', such as 'chat/a.jsonl:4'" in output
    corpus = Corpus.open(tmp_path / "out" / "train")
    said = []
    for document in range(corpus.documents):
        ((start, stop),) = corpus.spans(document)
        said.append(bytes(corpus.read(document)[start : stop - 1].astype(np.uint8)).decode())
    assert said == ["answer 1", "answer 2"] * 2


def test_conversation_at_fault_is_named(run, chat, tmp_path):
    limits = ("--max-tokens", "200", "--overlong", "error")
    code, output = run("--input", tmp_path / "chat" / "a.jsonl", *limits, tokenizer=chat)
    assert (code, "error: a.jsonl:3: " in output) == (1, True)


def test_conversations_need_records_and_a_tokenizer(run, chat, source, tmp_path):
    code, output = run("--input", source, tokenizer=chat)
    assert (code, f"{source}/b.txt holds no conversations" in output) == (1, True)
    learned = ("--chat-template", "chatml", "--train-tokenizer", "300")
    code, output = run("--input", tmp_path / "chat", tokenizer=learned)
    assert (code, "give one with --tokenizer" in output) == (1, True)


def test_progress_on_a_terminal_and_elsewhere(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(tool.time, "monotonic", lambda: now[0])
    progress = tool.Progress(is_terminal=False)
    for second, done, tokens in ((0.0, 200, 50), (2.0, 300, 100), (5.0, 400, 150), (10.0, 600, 250)):
        now[0] = second
        progress(done, 1000, tokens)
    assert capsys.readouterr().out.splitlines() == [
        "going on behind 20% that are done, 50 tokens",
        "encoded 40%, 150 tokens, 20 tokens/s, 00:15 left",
        "encoded 60%, 250 tokens, 20 tokens/s, 00:10 left",
    ]
    progress = tool.Progress(is_terminal=True)
    progress(200, 1000, 50)
    now[0] += 10.0
    time.sleep(0.15)  # the bar is drawn ten times a second at most
    progress(600, 1000, 250)
    progress.close()
    assert "20 tokens/s" in capsys.readouterr().err
