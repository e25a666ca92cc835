"""Gathering pieces of documents: compiled and numpy, against slices of what was written."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from index_files import pack_idx, place

from megazebra.data.corpus.corpus_writer import CorpusWriter
from megazebra.data.corpus.indexed_corpus import Corpus
from megazebra.data.errors import CorpusError
from megazebra.data.index import builder
from megazebra.data.index.order import Pieces

DTYPES = [np.uint8, np.int8, np.int16, np.uint16, np.int32, np.int64]


@pytest.fixture(params=["compiled", "numpy"], autouse=True)
def which(request, monkeypatch):
    if request.param == "numpy":
        monkeypatch.setattr(builder, "_native", None)
    elif builder.native() is None:
        pytest.skip(builder.describe())
    return request.param


@pytest.fixture
def no_fallback(which, monkeypatch):
    """The compiled kernel leaves what it can't do to Python; where it can, it has to do it."""
    if which == "compiled":
        monkeypatch.setattr(Corpus, "_read_each", None)


def write(folder: Path, documents: list, **options) -> Corpus:
    with CorpusWriter(folder / "corpus", **{"vocab_size": 100, **options}) as writer:
        writer.add_documents(documents)
    return Corpus(folder / "corpus")


def as_pieces(*pieces: tuple[int, int, int]) -> Pieces:
    return Pieces(*np.array(pieces, dtype=np.int64).reshape(-1, 3).T.copy())


@pytest.mark.usefixtures("no_fallback")
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), dtype=st.sampled_from(DTYPES))
def test_pieces_are_slices(tmp_path, data, dtype):
    documents = data.draw(st.lists(st.lists(st.integers(0, 99), max_size=9), min_size=1, max_size=9).filter(any))
    filled = [number for number, document in enumerate(documents) if document]
    pieces = []
    for _ in range(data.draw(st.integers(0, 6))):
        document = data.draw(st.sampled_from(filled))
        start = data.draw(st.integers(0, len(documents[document]) - 1))
        pieces.append((document, start, data.draw(st.integers(1, len(documents[document]) - start))))
    with closing(write(tmp_path, documents, dtype=dtype)) as corpus:
        gathered = corpus.gather(as_pieces(*pieces))
    assert gathered.dtype == np.int64
    assert gathered.tolist() == [token for n, start, length in pieces for token in documents[n][start : start + length]]


@pytest.mark.usefixtures("no_fallback")
@pytest.mark.parametrize("dtype", DTYPES)
def test_pieces_longer_than_any_buffer(tmp_path, dtype):
    documents = [np.arange(n) % 100 for n in (70_000, 3, 300_001)]
    corpus = write(tmp_path, documents, dtype=dtype)
    gathered = corpus.gather(as_pieces((2, 1, 300_000), (0, 0, 70_000), (1, 0, 3)))
    np.testing.assert_array_equal(gathered, np.concatenate((documents[2][1:], documents[0], documents[1])))


@pytest.mark.usefixtures("no_fallback")
def test_documents_behind_many_blocks(tmp_path):
    """Their bytes are found from the sums of blocks of documents."""
    lengths = np.random.default_rng(0).integers(0, 4, size=5000)
    documents = np.split(np.arange(lengths.sum()) % 100, np.cumsum(lengths)[:-1])
    corpus = write(tmp_path, documents)
    filled = np.flatnonzero(lengths)[::7]
    gathered = corpus.gather(Pieces(filled, np.zeros_like(filled), lengths[filled]))
    np.testing.assert_array_equal(gathered, np.concatenate([documents[n] for n in filled]))


@pytest.mark.usefixtures("no_fallback")
def test_documents_in_any_order_in_bin(tmp_path):
    prefix = place(tmp_path, pack_idx(1, [2, 3, 1], [4, 1, 0], [0, 1, 2, 3]), bytes(range(6)))
    assert Corpus(prefix).gather(as_pieces((0, 0, 2), (1, 1, 2), (2, 0, 1), (1, 0, 3))).tolist() == [
        *(4, 5),
        *(2, 3),
        0,
        *(1, 2, 3),
    ]


@pytest.mark.usefixtures("no_fallback")
def test_documents_of_more_than_two_to_the_31_tokens(tmp_path):
    longest = 2**31 - 1
    prefix = place(tmp_path, pack_idx(1, [2, longest, 3], [0, 2, longest + 2], [0, 1, 3]), b"")
    with open(f"{prefix}.bin", "wb") as file:
        file.seek(longest)
        file.write(bytes([1, 2, 3, 4, 5]))
    assert Corpus(prefix).gather(as_pieces((1, longest - 3, 6), (0, 0, 2))).tolist() == [0, 1, 2, 3, 4, 5, 0, 0]


@pytest.mark.usefixtures("no_fallback")
def test_rows_of_a_batch_are_written_in_place(tmp_path):
    corpus = write(tmp_path, [[1, 2, 3], [4, 5]])
    batch = np.full((2, 4), -1)
    assert corpus.gather(as_pieces((1, 0, 2), (0, 1, 2)), batch[1]).base is batch
    corpus.gather(as_pieces((0, 0, 1)), batch[0, 1:2])
    assert batch.tolist() == [[-1, 1, -1, -1], [4, 5, 2, 3]]
    with pytest.raises(AssertionError, match=r"2 tokens into \[3\]"):
        corpus.gather(as_pieces((1, 0, 2)), np.zeros(3, dtype=np.int64))


@pytest.mark.usefixtures("no_fallback")
def test_nothing_gathered_is_empty(tmp_path):
    assert write(tmp_path, [[1]]).gather(as_pieces()).tolist() == []


@pytest.mark.usefixtures("no_fallback")
def test_vocabulary_larger_than_the_type(tmp_path):
    prefix = place(tmp_path, pack_idx(2, [2], [0], [0, 1]), bytes([0, 127]))
    assert Corpus(prefix, vocab_size=2**40).gather(as_pieces((0, 0, 2))).tolist() == [0, 127]


@pytest.mark.parametrize("piece", [(2, 0, 1), (-1, 0, 1), (0, -1, 1), (0, 0, 4), (0, 3, 1), (1, 2**62, 1)])
def test_pieces_outside_a_document_are_refused(tmp_path, piece):
    corpus = write(tmp_path, [[1, 2, 3], [4, 5]])
    with pytest.raises(IndexError, match="document"):
        corpus.gather(as_pieces((0, 0, 1), piece))


@pytest.mark.parametrize(
    ("dtype", "wrong", "vocab_size"),
    [(np.uint8, 255, 200), (np.uint16, 65_535, 65_535), (np.int32, 70_000, 70_000), (np.int64, 2**62, 2**62)]
    + [(dtype, -1, vocab_size) for dtype in (np.int8, np.int16, np.int32, np.int64) for vocab_size in (5, None)],
)
def test_ids_outside_the_vocabulary_are_named(tmp_path, dtype, wrong, vocab_size):
    dtype = np.dtype(dtype)
    code = {"u1": 1, "i1": 2, "i2": 3, "i4": 4, "i8": 5, "u2": 8}[dtype.str[1:]]
    content = np.array([0, 1, 2, 3, wrong, 4], dtype=dtype).tobytes()
    idx = pack_idx(code, [2, 4], [0, 2 * dtype.itemsize], [0, 1, 2])
    corpus = Corpus(place(tmp_path, idx, content), vocab_size=vocab_size)
    assert corpus.gather(as_pieces((0, 0, 2), (1, 0, 2), (1, 3, 1))).tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(CorpusError, match=f"document 1 has token id {wrong} at position 2, outside the vocabulary"):
        corpus.gather(as_pieces((0, 0, 2), (1, 1, 3)))


def test_bin_truncated_after_opening_is_an_error(tmp_path):
    corpus = write(tmp_path, [[1, 2, 3], [4, 5]])
    os.truncate(f"{corpus.prefix}.bin", 7)
    assert corpus.gather(as_pieces((0, 0, 3))).tolist() == [1, 2, 3]
    with pytest.raises(CorpusError, match="ends at byte 7 although it had 10"):
        corpus.gather(as_pieces((0, 0, 3), (1, 0, 1)))


@pytest.mark.usefixtures("no_fallback")
def test_files_replaced_after_opening_are_not_looked_at(tmp_path):
    corpus = write(tmp_path, [[1, 2, 3], [4, 5]])
    write(tmp_path, [[9]])
    assert corpus.gather(as_pieces((1, 0, 2), (0, 0, 3))).tolist() == [4, 5, 1, 2, 3]


def test_closed_corpus_gathers_nothing(tmp_path):
    corpus = write(tmp_path, [[1, 2, 3]])
    corpus.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        corpus.gather(as_pieces((0, 0, 3)))


@pytest.mark.usefixtures("no_fallback")
def test_threads_share_one_corpus(tmp_path):
    lengths = [n % 7 for n in range(1500)]
    starts = [0, *accumulate(lengths)]
    documents = [list(np.arange(*bounds) % 100) for bounds in pairwise(starts)]
    corpus = write(tmp_path, documents)
    filled = [n for n in range(1500) if lengths[n]]
    picks = [filled[turn::41] for turn in range(41)]
    with ThreadPoolExecutor(4) as pool:
        gathered = list(pool.map(lambda pick: corpus.gather(as_pieces(*((n, 0, lengths[n]) for n in pick))), picks))
    assert [row.tolist() for row in gathered] == [[token for n in pick for token in documents[n]] for pick in picks]
