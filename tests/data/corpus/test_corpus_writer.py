"""The writer: batches, other corpora appended, and assistant spans."""

from __future__ import annotations

import os
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megazebra.data.corpus import corpus_writer, token_counts
from megazebra.data.corpus.corpus_writer import SUFFIXES, CorpusWriter
from megazebra.data.corpus.indexed_corpus import Corpus
from megazebra.data.errors import CorpusError

DOCUMENTS = [[], [1, 2, 3], [4], [], [], [5, 6, 7, 8, 9, 0, 1], [2], []]
SPANS = [[], [[0, 1], [1, 3]], [], [], [], [[2, 7]], [[0, 1]], []]
VOCABULARY = 10


def write(prefix: Path, documents=DOCUMENTS, spans=None, **options) -> Path:
    with CorpusWriter(prefix, **{"vocab_size": VOCABULARY, "with_spans": spans is not None, **options}) as writer:
        writer.add_documents(documents, spans)
    return prefix


def append(prefix: Path, *parts: Path, **options) -> Path:
    with CorpusWriter(prefix, **{"vocab_size": VOCABULARY, **options}) as writer:
        for part in parts:
            writer.append(Corpus(part))
    return prefix


def content(prefix: Path) -> dict[str, bytes]:
    return {path.suffix: path.read_bytes() for path in prefix.parent.glob(f"{prefix.name}.*")}


def test_batches_and_single_documents_give_the_same_files(tmp_path):
    whole = write(tmp_path / "whole", spans=SPANS)
    with CorpusWriter(tmp_path / "single", vocab_size=VOCABULARY, with_spans=True) as writer:
        for tokens, spans in zip(DOCUMENTS, SPANS, strict=True):
            writer.add_document(tokens, spans)
        writer.add_documents([], [])
    assert content(tmp_path / "single") == content(whole)
    corpus = Corpus(whole)
    assert [corpus.read(document).tolist() for document in range(corpus.documents)] == DOCUMENTS


def test_integers_of_any_type_stay_what_they_are(tmp_path):
    types = [np.uint64, np.int64, np.uint16, np.int8, np.uint64, np.dtype(">i4")]
    documents = [np.array([2**14 + n if np.dtype(kind).itemsize > 1 else n], kind) for n, kind in enumerate(types)]
    corpus = Corpus(write(tmp_path / "corpus", documents, vocab_size=2**15))
    assert [int(corpus.read(n)[0]) for n in range(len(types))] == [int(ids[0]) for ids in documents]


@pytest.mark.parametrize("kind", [np.int64, np.uint64])
def test_wrong_id_is_found_in_its_batch(tmp_path, kind):
    batch = [[], np.array([1, 2]), [], np.array([3, VOCABULARY], kind), [99]]

    def add_both():
        with CorpusWriter(tmp_path / "corpus", vocab_size=VOCABULARY) as writer:
            writer.add_documents(DOCUMENTS)
            writer.add_documents(batch)

    with pytest.raises(CorpusError, match=f"document {len(DOCUMENTS) + 3} has token id {VOCABULARY} at position 1,"):
        add_both()


def test_tokens_are_counted_across_batches(tmp_path, monkeypatch):
    monkeypatch.setattr(token_counts, "BATCH_TOKENS", 5)
    with CorpusWriter(tmp_path / "corpus", vocab_size=VOCABULARY) as writer:
        for _ in range(3):
            writer.add_documents(DOCUMENTS)
        assert writer.token_counts.tolist() == [3, 6, 6, *[3] * 7]
        assert (writer.tokens, writer.documents) == (36, 24)


@pytest.mark.parametrize("tokens", [0, 1, 3, 4, 5, 8, 9])
def test_long_documents_become_full_sequences_and_a_rest(tmp_path, monkeypatch, tokens):
    monkeypatch.setattr(corpus_writer, "LONGEST_SEQUENCE", 4)
    prefix = write(tmp_path / "corpus", [[7] * tokens, [1]])
    sequences = Corpus(prefix, by_sequence=True)
    assert sequences.document_lengths.tolist() == [*[4] * (tokens // 4), *([tokens % 4] if tokens % 4 else []), 1]
    assert Corpus(prefix).document_lengths.tolist() == [tokens, 1]


@settings(max_examples=30, deadline=None)
@given(
    parts=st.lists(
        st.lists(st.lists(st.integers(0, VOCABULARY - 1), max_size=7), max_size=5).filter(any), min_size=1, max_size=3
    ),
    chunk=st.integers(1, 9),
)
def test_appending_is_writing_end_to_end(tmp_path_factory, parts, chunk):
    folder = tmp_path_factory.mktemp("append")
    parts = [[np.array(tokens, dtype=np.int64) for tokens in part] for part in parts]
    spans = [[[[0, len(tokens)]] if len(tokens) else [] for tokens in part] for part in parts]
    written = [write(folder / f"part{n}", part, said) for n, (part, said) in enumerate(zip(parts, spans, strict=True))]
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(corpus_writer, "CHUNK_TOKENS", chunk)
        appended = append(folder / "appended", *written, with_spans=True)
    whole = write(folder / "whole", list(chain(*parts)), list(chain(*spans)))
    assert content(appended) == content(whole)
    assert set(content(whole)) == {".bin", ".idx", ".json", ".spans"}


def test_appending_takes_a_bounded_number_of_tokens_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus_writer, "CHUNK_TOKENS", 4)
    part = write(tmp_path / "part")
    gathered = []
    gather = Corpus.gather
    monkeypatch.setattr(Corpus, "gather", lambda corpus, pieces: gathered.append(pieces) or gather(corpus, pieces))
    append(tmp_path / "appended", part, part)
    assert [int(pieces.lengths.sum()) for pieces in gathered] == [4, 4, 4] * 2


def test_appending_changes_the_type_but_not_the_vocabulary(tmp_path):
    part = write(tmp_path / "part", dtype=np.int32)
    appended = Corpus(append(tmp_path / "appended", part, vocab_size=VOCABULARY + 1))
    assert appended.dtype == np.uint16
    assert [appended.read(document).tolist() for document in range(appended.documents)] == DOCUMENTS
    with pytest.raises(CorpusError, match=r"part has 10 token ids, .*smaller takes 9"):
        append(tmp_path / "smaller", part, vocab_size=9)
    os.remove(f"{part}.meta.json")
    with pytest.raises(CorpusError, match="an unknown number of token ids"):
        append(tmp_path / "unknown", part)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(("smaller", "unknown"))) == []


def test_spans_come_back(tmp_path):
    corpus = Corpus(write(tmp_path / "corpus", spans=SPANS))
    assert corpus.has_spans
    assert [corpus.spans(document).tolist() for document in range(corpus.documents)] == SPANS
    assert not Corpus(write(tmp_path / "plain")).has_spans


def test_spans_are_held_against_their_checksum(tmp_path):
    prefix = write(tmp_path / "corpus", spans=SPANS)
    path = Path(f"{prefix}.spans")
    damaged = bytearray(path.read_bytes())
    damaged[-16] ^= 1  # the last span, 0 to 1 of the last but one document, becomes empty
    path.write_bytes(damaged)
    with pytest.raises(CorpusError, match="does not match its checksum"):
        Corpus(prefix)


def test_corpus_rebuilt_without_spans_keeps_no_old_ones(tmp_path):
    prefix = write(tmp_path / "corpus", spans=SPANS)
    Path(f"{prefix}.spans.partial").write_bytes(b"left by a killed run")
    write(prefix)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus.bin", "corpus.idx", "corpus.meta.json"]
    assert not Corpus(prefix).has_spans


@pytest.mark.parametrize("renames", range(len(SUFFIXES)))
def test_no_index_is_visible_before_everything_else(tmp_path, monkeypatch, renames):
    """Stop after so many renames over an older corpus: what can be opened is whole."""
    prefix = write(tmp_path / "corpus", [[7]], [[[0, 1]]])
    replace, left = os.replace, iter(range(renames))

    def stop_in_time(source, target):
        if next(left, None) is None:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(corpus_writer.os, "replace", stop_in_time)
    with pytest.raises(KeyboardInterrupt):
        write(prefix, spans=SPANS)
    with pytest.raises(CorpusError, match=r"corpus\.idx does not exist"):
        Corpus(prefix)


@pytest.mark.parametrize(
    ("spans", "complaint"),
    [
        ([[[0, 4]], []], "document 0 has 3 tokens and the span 0 to 4"),
        ([[], [[1, 1]]], "document 1 has 2 tokens and the span 1 to 1"),
        ([[[1, 3], [2, 3]], []], "document 0 has 3 tokens and the span 2 to 3"),
        ([[[-1, 1]], []], "document 0 has 3 tokens and the span -1 to 1"),
        ([[]], "1 lists of spans came with 2 documents"),
        (None, "documents from 0 on come without assistant spans"),
        ([None, None], "documents from 0 on come without assistant spans"),
        ([[], None], "documents from 0 on come without assistant spans, unlike"),
        ([[], [0, 1, 2]], r"spans of document 1 is int64 \[3\]; give a list of integer pairs"),
        ([[[0, 1, 2]], []], r"spans of document 0 is int64 \[1, 3\]"),
        ([[[0.5, 2.9]], []], r"spans of document 0 is float64 \[1, 2\]"),
        ([[[0.0, 2.0]], []], r"spans of document 0 is float64 \[1, 2\]"),
        ([[[False, True]], []], r"spans of document 0 is bool \[1, 2\]"),
        ([[], [["0", "1"]]], r"spans of document 1 is <U1 \[1, 2\]"),
        ([[], [[0, 1], [1]]], r"spans of document 1: setting an array element"),
        ([np.zeros((2, 0), dtype=int), []], r"spans of document 0 is int64 \[2, 0\]"),
        ([[[2**64, 2**65]], []], r"spans of document 0 is object \[1, 2\]"),
        ([np.array([[0, 2**64 - 1]], dtype=np.uint64), []], "document 0 has 3 tokens and the span 0 to"),
    ],
)
def test_spans_that_do_not_fit_are_refused(tmp_path, spans, complaint):
    with pytest.raises(CorpusError, match=complaint):
        write(tmp_path / "corpus", [[1, 2, 3], [4, 5]], spans, with_spans=True)
    assert list(tmp_path.iterdir()) == []


def test_conversations_and_plain_text_do_not_mix(tmp_path):
    plain, chat = write(tmp_path / "plain"), write(tmp_path / "chat", spans=SPANS)
    with pytest.raises(CorpusError, match="documents from 0 on come without assistant spans"):
        append(tmp_path / "both", plain, with_spans=True)
    with pytest.raises(CorpusError, match="documents from 8 on come with assistant spans"):
        append(tmp_path / "both", plain, chat)
