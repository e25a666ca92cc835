"""tools/preprocess_data.py on files of records and on directories."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace

import numpy as np
import pytest

from megazebra.data.corpus.indexed_corpus import Corpus
from megazebra.data.errors import CorpusError
from megazebra.data.prepare import publish as publish_module
from megazebra.data.prepare.encode_task import Sizes
from megazebra.data.prepare.job import Preprocessing
from megazebra.data.prepare.open_encoder import EncoderOptions
from megazebra.data.prepare.preprocess import preprocess

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")
zstandard = pytest.importorskip("zstandard")


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


def documents(prefix, end=1):
    corpus = Corpus(prefix)
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
    assert Corpus(tmp_path / "out" / "train").vocab_size > 257


def test_share_that_falls_on_no_record(run, source, tmp_path):
    code, output = run("--input", source, "--validation-share", "1e-9")
    assert (code, "holds out none of the documents; there is no validation corpus" in output) == (0, True)
    assert documents(tmp_path / "out" / "train") == EVERYTHING
    assert not (tmp_path / "out" / "validation.idx").exists()
    assert "is up to date" in run("--input", source, "--validation-share", "1e-9")[1]


def test_without_end_of_document(run, source, tmp_path):
    assert run("--input", source / "a.jsonl", "--no-eod", "--validation-share", "0")[0] == 0
    assert documents(tmp_path / "out" / "train", end=0) == EVERYTHING[:30]
    assert Corpus(tmp_path / "out" / "train").meta.eod_id is None
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
    assert not (tmp_path / "out" / ".parts").exists()


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
    before = list((tmp_path / "out" / ".parts").iterdir())
    said = []
    with pytest.raises(TypeError):
        preprocess(small(source, tmp_path / "out", validation_share=0.3), say=said.append)
    assert "parts of a build of other inputs or options" in said[0] + said[1]
    assert set(before) < set((tmp_path / "out" / ".parts").iterdir())
    monkeypatch.undo()
    begun = []
    preprocess(small(source, tmp_path / "out"), progress=lambda done, *_: begun.append(done))
    assert len(begun) == 1  # nothing was left to encode
    assert not (tmp_path / "out" / ".parts").exists()
