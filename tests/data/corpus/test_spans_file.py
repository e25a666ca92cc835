"""The assistant spans of a corpus: their file byte by byte, and every way it can be damaged."""

from __future__ import annotations

import os
import pickle
import struct
import zlib
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megazebra.data.corpus.corpus_writer import CorpusWriter
from megazebra.data.corpus.indexed_corpus import Corpus
from megazebra.data.corpus.spans import DocumentSpans, pack_spans, read_spans
from megazebra.data.errors import CorpusError

LENGTHS = np.array([5, 0, 3, 9])
SPANS = [[[0, 2], [2, 5]], [], [], [[1, 8]]]
HAND_MADE = (
    b"MZSPANS\x00"
    + struct.pack("<3Q", 1, 4, 3)
    + struct.pack("<5q", 0, 2, 2, 2, 3)
    + struct.pack("<6q", 0, 2, 2, 5, 1, 8)
)
FIRSTS, BOUNDS = 32, 32 + 40


def place(folder: Path, content: bytes) -> Path:
    path = folder / "corpus.spans"
    path.write_bytes(content)
    return path


def collect(spans: list[list[list[int]]]) -> DocumentSpans:
    return DocumentSpans.collect([np.array(each, dtype=np.int32).reshape(-1, 2) for each in spans])


def test_packing_makes_the_hand_made_bytes():
    assert pack_spans(collect(SPANS)) == HAND_MADE


def test_reading_the_hand_made_bytes(tmp_path):
    read = read_spans(place(tmp_path, HAND_MADE), LENGTHS, zlib.crc32(HAND_MADE))
    assert [read.of(document).tolist() for document in range(4)] == SPANS
    assert read.bounds.dtype == np.int64
    assert read.tokens == 12


def test_documents_without_spans(tmp_path):
    path = place(tmp_path, pack_spans(collect([[], []])))
    read = read_spans(path, np.array([1, 2]))
    assert [read.of(document).shape for document in range(2)] == [(0, 2), (0, 2)]


def replaced(at: int, *numbers: int) -> bytes:
    return HAND_MADE[:at] + struct.pack(f"<{len(numbers)}q", *numbers) + HAND_MADE[at + 8 * len(numbers) :]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "holds no assistant spans"),
        (b"MMIDIDX\x00" + HAND_MADE[8:], "holds no assistant spans"),
        (HAND_MADE[:20], "truncated: 20 bytes"),
        (HAND_MADE[:-1], "4 documents and 3 spans take 120 bytes, the file has 119"),
        (HAND_MADE + b"x", "the file has 121"),
        (replaced(8, 2), "version 2"),
        (replaced(16, 2**62), "take .* bytes, the file has 120"),
        (replaced(24, -1), "take .* bytes, the file has 120"),
        (replaced(16, 2, 4), "is of 2 documents, the corpus has 4"),
        (replaced(FIRSTS, 1), "do not rise from 0 to its 3 spans"),
        (replaced(FIRSTS + 8, 3, 2), "do not rise"),
        (replaced(FIRSTS + 8, 2**63 - 1), "do not rise"),
        (replaced(FIRSTS + 32, 2), "do not rise"),
        (replaced(FIRSTS + 8, 2, 3, 3), "document 1 has 0 tokens and the span 1 to 8"),
        (replaced(BOUNDS, -1), "document 0 has 5 tokens and the span -1 to 2"),
        (replaced(BOUNDS, 2, 2), "the span 2 to 2"),
        (replaced(BOUNDS, -(2**63), 2**63 - 1), "the span -9223372036854775808 to 9223372036854775807"),
        (replaced(BOUNDS + 16, 1, 5), "the span 1 to 5"),
        (replaced(BOUNDS + 16, 2, 6), "the span 2 to 6"),
        (replaced(BOUNDS + 32, 1, 10), "document 3 has 9 tokens and the span 1 to 10"),
    ],
)
def test_damaged_files_are_refused(tmp_path, content, complaint):
    with pytest.raises(CorpusError, match=complaint) as raised:
        read_spans(place(tmp_path, content), LENGTHS)
    assert "corpus.spans" in str(raised.value)


def test_wrong_checksum_is_refused(tmp_path):
    with pytest.raises(CorpusError, match="does not match its checksum"):
        read_spans(place(tmp_path, HAND_MADE), LENGTHS, zlib.crc32(HAND_MADE) ^ 1)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, len(HAND_MADE) - 8), number=st.integers(-(2**63), 2**63 - 1) | st.integers(-1, 10))
def test_any_damage_is_refused_or_serves_spans_inside_their_documents(tmp_path, at, number):
    try:
        read = read_spans(place(tmp_path, replaced(at, number)), LENGTHS)
    except CorpusError:
        return
    for document, length in enumerate(LENGTHS):
        edges = list(chain(*read.of(document).tolist()))
        assert all(0 <= edge <= length for edge in edges)
        assert all(first < second for first, second in pairwise(edges[:2]))
        assert edges == sorted(edges)


@pytest.fixture
def prefix(tmp_path):
    with CorpusWriter(tmp_path / "corpus", vocab_size=10, with_spans=True) as writer:
        writer.add_documents([[1] * length for length in LENGTHS], SPANS)
    return tmp_path / "corpus"


def test_corpus_gives_the_spans_of_its_documents(prefix):
    for corpus in (Corpus(prefix), pickle.loads(pickle.dumps(Corpus(prefix)))):
        assert corpus.has_spans
        assert [corpus.spans(document).tolist() for document in range(4)] == SPANS


def test_sequences_have_no_spans_of_their_own(prefix):
    corpus = Corpus(prefix, by_sequence=True)
    assert corpus.has_spans
    assert corpus.documents == 3
    with pytest.raises(AssertionError, match="opened without spans"):
        corpus.spans(0)


def test_corpus_without_spans_says_so(tmp_path):
    with CorpusWriter(tmp_path / "corpus", vocab_size=10) as writer:
        writer.add_document([1])
    assert not Corpus(tmp_path / "corpus").has_spans


def test_spans_that_the_sidecar_knows_have_to_be_there(prefix):
    os.remove(f"{prefix}.spans")
    with pytest.raises(CorpusError, match=r"corpus\.spans does not exist, although"):
        Corpus(prefix)


def test_spans_of_another_build_are_refused(prefix):
    other = [[[0, 1], [2, 5]], *SPANS[1:]]
    Path(f"{prefix}.spans").write_bytes(pack_spans(collect(other)))
    with pytest.raises(CorpusError, match=r"corpus\.spans does not match its checksum"):
        Corpus(prefix)


def test_spans_are_part_of_the_fingerprint(prefix, tmp_path):
    with CorpusWriter(tmp_path / "other", vocab_size=10, with_spans=True) as writer:
        writer.add_documents([[1] * length for length in LENGTHS], [[], *SPANS[1:]])
    assert Corpus(prefix).fingerprint != Corpus(tmp_path / "other").fingerprint


def test_spans_serve_without_a_sidecar(prefix):
    os.remove(f"{prefix}.meta.json")
    corpus = Corpus(prefix)
    assert corpus.has_spans
    assert corpus.spans(3).tolist() == [[1, 8]]
