"""The sidecar: every field is checked, and its checksums find what is damaged."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from pathlib import Path

import pytest

from megazebra.data.corpus import bin_file, sidecar
from megazebra.data.corpus.corpus_writer import CorpusWriter
from megazebra.data.corpus.indexed_corpus import Corpus
from megazebra.data.errors import CorpusError


@pytest.fixture
def prefix(tmp_path):
    return write(tmp_path / "corpus", [[1, 2, 3], [4], [], [5, 6]])


def write(prefix: Path, documents: list[list[int]]) -> Path:
    with CorpusWriter(prefix, vocab_size=10) as writer:
        writer.add_documents(documents)
    return prefix


def edit_meta(prefix: Path, **change) -> None:
    path = Path(f"{prefix}.meta.json")
    path.write_text(json.dumps({**json.loads(path.read_bytes()), **change}))


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "is not JSON"),
        (b"\xff", "is not JSON"),
        (b"[]", "is no megazebra-corpus"),
        (b"{}", "is no megazebra-corpus"),
        (b'{"format": "megazebra-corpus", "version": 1}', r"no usable tokens \(missing\), documents \(missing\)"),
        (b"[" * 100_000, "is not JSON"),
    ],
)
def test_damaged_sidecar_is_refused(prefix, content, complaint):
    Path(f"{prefix}.meta.json").write_bytes(content)
    with pytest.raises(CorpusError, match=complaint):
        Corpus(prefix)


@pytest.mark.parametrize("change", [{"tokens": 7}, {"documents": 3}, {"dtype": "int16"}, {"bin_bytes": 14}])
def test_sidecar_of_another_build_is_refused(prefix, change):
    edit_meta(prefix, **change)
    with pytest.raises(CorpusError, match="of different builds"):
        Corpus(prefix)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tokens", -1),
        ("documents", True),
        ("documents", 4.0),
        ("vocab_size", 0),
        ("vocab_size", 2**63 + 1),
        ("eod_id", 10**9),
        ("eod_id", -1),
        ("eod_id", "x"),
        ("eod_id", False),
        ("dtype", 2),
        ("bin_bytes", "14"),
        ("checksum_block_bytes", 0),
        ("bin_crc32", None),
        ("bin_crc32", ["x"]),
        ("bin_crc32", [1, -1]),
        ("idx_crc32", None),
        ("spans_crc32", 0.5),
        ("unigram_entropy", float("nan")),
        ("unigram_entropy", False),
        ("unigram_cross_entropy", "no"),
        ("unigram_cross_entropy", float("inf")),
        ("tokenizer", "x"),
        ("tokenizer", {"path": "tokenizer.json"}),
        ("tokenizer", {"fingerprint": 1, "path": "tokenizer.json"}),
        ("inputs", []),
        ("request", "x"),
    ],
)
def test_unusable_fields_are_refused(prefix, field, value):
    edit_meta(prefix, **{field: value})
    with pytest.raises(CorpusError, match=rf"no usable {field} \({re.escape(repr(value))}\); restore"):
        Corpus(prefix)


def test_fields_that_may_be_missing(prefix):
    path = Path(f"{prefix}.meta.json")
    required = {field.name for field in dataclasses.fields(sidecar.CorpusMeta) if field.default is dataclasses.MISSING}
    fields = json.loads(path.read_bytes())
    path.write_text(json.dumps({name: fields[name] for name in {"format", "version", *required}} | {"later": 1}))
    assert Corpus(prefix).meta.eod_id is None
    for name in required:
        path.write_text(json.dumps({other: value for other, value in fields.items() if other != name}))
        with pytest.raises(CorpusError, match=rf"no usable {name} \(missing\); restore"):
            Corpus(prefix)


def test_verify_names_the_damaged_block(tmp_path, monkeypatch):
    monkeypatch.setattr(sidecar.BlockChecksums.__init__, "__defaults__", (8,))
    prefix = write(tmp_path / "corpus", [[1, 2, 3], [4, 5, 6, 7]])
    Corpus(prefix).verify()
    content = bytearray(Path(f"{prefix}.bin").read_bytes())
    content[10] ^= 1
    Path(f"{prefix}.bin").write_bytes(content)
    with pytest.raises(CorpusError, match="in block 1, bytes 8 to 14"):
        Corpus(prefix).verify()


def test_verify_tells_how_far_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(bin_file, "READ_BYTES", 5)
    corpus = Corpus(write(tmp_path / "corpus", [[1, 2, 3], [4, 5, 6]]))
    heard: list[tuple[int, int]] = []
    corpus.verify(lambda done, total: heard.append((done, total)))
    assert heard == [(5, 12), (10, 12), (12, 12)]


def test_verify_checks_the_index_and_needs_a_sidecar(prefix):
    edit_meta(prefix, idx_crc32=0)
    with pytest.raises(CorpusError, match=r"corpus\.idx does not match its checksum"):
        Corpus(prefix).verify()
    edit_meta(prefix, bin_crc32=[])
    os.remove(f"{prefix}.meta.json")
    with pytest.raises(CorpusError, match="no checksums to verify against"):
        Corpus(prefix).verify()
