"""The bytes of `.idx` against a file put together by hand, and every way it can be damaged."""

from __future__ import annotations

import os
import struct
from contextlib import closing
from itertools import accumulate, chain

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from index_files import pack_idx, place

from megazebra.data.corpus import index_reader
from megazebra.data.corpus.corpus_writer import CorpusWriter
from megazebra.data.corpus.indexed_corpus import Corpus
from megazebra.data.errors import CorpusError

DOCUMENTS = [[5, 6, 7], [], [8], [], [9, 10], []]

# The same corpus byte by byte, as the format's description has it: uint16 (8), 3 sequences, 7 boundaries.
HAND_MADE_BIN = struct.pack("<6H", 5, 6, 7, 8, 9, 10)
HAND_MADE_IDX = (
    b"MMIDIDX\x00\x00"
    + (1).to_bytes(8, "little")
    + bytes([8])
    + (3).to_bytes(8, "little")
    + (7).to_bytes(8, "little")
    + b"".join(n.to_bytes(4, "little") for n in (3, 1, 2))
    + b"".join(n.to_bytes(8, "little") for n in (0, 6, 8))
    + b"".join(n.to_bytes(8, "little") for n in (0, 1, 1, 2, 2, 3, 3))
)


def test_writer_makes_the_hand_made_bytes(tmp_path):
    with CorpusWriter(tmp_path / "corpus", vocab_size=11) as writer:
        writer.add_documents(DOCUMENTS)
    assert (tmp_path / "corpus.idx").read_bytes() == HAND_MADE_IDX
    assert (tmp_path / "corpus.bin").read_bytes() == HAND_MADE_BIN


@pytest.mark.parametrize("modes", [b"", bytes(3)], ids=["plain", "with modes"])
def test_reader_reads_the_hand_made_bytes(tmp_path, modes):
    corpus = Corpus(place(tmp_path, HAND_MADE_IDX + modes, HAND_MADE_BIN))
    assert corpus.meta is None
    assert corpus.tokens == 6
    assert [corpus.read(i).tolist() for i in range(corpus.documents)] == DOCUMENTS


def test_document_of_several_sequences(tmp_path):
    prefix = place(tmp_path, pack_idx(8, [3, 1, 2], [0, 6, 8], [0, 2, 3]), HAND_MADE_BIN)
    assert contents(Corpus(prefix)) == [[5, 6, 7, 8], [9, 10]]
    assert contents(Corpus(prefix, by_sequence=True)) == [[5, 6, 7], [8], [9, 10]]


@pytest.mark.parametrize("piece", [1, 2, 3, 2**17])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_arrangement_reads_back(tmp_path, monkeypatch, piece, data):
    """Documents of any number of sequences, laid in any order into .bin, whatever pieces the index is read in."""
    monkeypatch.setattr(index_reader, "PIECE", piece)
    tokens = st.lists(st.integers(0, 255), max_size=4)
    documents = data.draw(st.lists(st.lists(tokens, max_size=3), min_size=1, max_size=6).filter(has_tokens))
    order = data.draw(st.permutations(range(len(documents))))
    begins: dict[int, list[int]] = {}
    content = b""
    for number in order:
        sizes = [len(sequence) for sequence in documents[number]]
        begins[number] = [len(content) + before for before in accumulate([0, *sizes[:-1]])][: len(sizes)]
        content += bytes(chain(*documents[number]))
    sequences = list(chain(*documents))
    idx = pack_idx(
        1,
        lengths=[len(sequence) for sequence in sequences],
        offsets=list(chain(*(begins[number] for number in range(len(documents))))),
        boundaries=[0, *accumulate(len(document) for document in documents)],
    )
    prefix = place(tmp_path, idx, content)
    with closing(Corpus(prefix)) as corpus:
        assert contents(corpus) == [list(chain(*document)) for document in documents]
    with closing(Corpus(prefix, by_sequence=True)) as corpus:
        assert contents(corpus) == sequences
        assert corpus.fingerprint == Corpus(prefix).fingerprint


def has_tokens(documents: list[list[list[int]]]) -> bool:
    return any(sequence for document in documents for sequence in document)


def contents(corpus: Corpus) -> list[list[int]]:
    return [corpus.read(i).tolist() for i in range(corpus.documents)]


def test_lengths_take_four_bytes_until_one_needs_more(tmp_path):
    longest = 2**31 - 1
    prefix = place(tmp_path, pack_idx(1, [longest, longest, 3], [0, longest, 2 * longest], [0, 1, 3]), b"")
    os.truncate(f"{prefix}.bin", 2 * longest)
    with open(f"{prefix}.bin", "ab") as file:
        file.write(bytes([7, 8, 9]))
    by_document = Corpus(prefix)
    assert by_document.document_lengths.dtype == np.int64
    assert by_document.document_lengths.tolist() == [longest, longest + 3]
    assert by_document.read(1, longest - 2).tolist() == [0, 0, 7, 8, 9]
    by_sequence = Corpus(prefix, by_sequence=True)
    assert by_sequence.document_lengths.dtype == np.int32
    assert by_sequence.tokens == by_document.tokens == 2 * longest + 3
    assert by_sequence.read(2).tolist() == [7, 8, 9]


def replaced(at: int, value: bytes) -> bytes:
    return HAND_MADE_IDX[:at] + value + HAND_MADE_IDX[at + len(value) :]


LENGTHS, OFFSETS, BOUNDARIES = 34, 34 + 12, 34 + 12 + 24


@pytest.mark.parametrize(
    ("idx", "complaint"),
    [
        (b"", "no Megatron index"),
        (b"\x93NUMPY" + HAND_MADE_IDX, "no Megatron index"),
        (HAND_MADE_IDX[:20], "truncated"),
        (HAND_MADE_IDX[:-1], "truncated"),
        (HAND_MADE_IDX + b"x", "another size"),
        (replaced(9, b"\x02"), "version 2"),
        (replaced(17, b"\x09"), "token type 9"),
        (replaced(17, b"\x00"), "token type 0"),
        (replaced(17, b"\x07"), "float32 values, not token ids"),
        (replaced(18, struct.pack("<Q", 2**61)), "truncated"),
        (replaced(18, struct.pack("<Q", 2**64 - 1)), "truncated"),
        (replaced(26, struct.pack("<Q", 0)), "another size"),
        (replaced(LENGTHS, struct.pack("<i", -1)), "sequence 0 has -1 tokens"),
        (replaced(LENGTHS, struct.pack("<i", 2**31 - 1)), "sequence 0 has 2147483647 tokens"),
        (replaced(LENGTHS, bytes(12)), "holds no tokens"),
        (replaced(OFFSETS, struct.pack("<q", -2)), "sequence 0 has 3 tokens from byte -2"),
        (replaced(OFFSETS + 8, struct.pack("<q", 2**63 - 1)), "sequence 1 has 1 tokens from byte 9223372036854775807"),
        (replaced(OFFSETS + 16, struct.pack("<q", 6)), "accounts for 10"),
        (replaced(BOUNDARIES, struct.pack("<q", 1)), "do not rise from 0"),
        (replaced(BOUNDARIES + 8, struct.pack("<q", 3)), "do not rise from 0"),
        (replaced(BOUNDARIES + 48, struct.pack("<q", 2)), "do not rise from 0"),
        (pack_idx(8, [], [], []), "holds no tokens"),
        (pack_idx(8, [], [], [0]), "holds no tokens"),
        (pack_idx(8, [6], [0], []), "holds no tokens"),
        (pack_idx(8, [6], [0], [0]), "do not rise from 0"),
        (pack_idx(8, [6], [0], [0, -1, 1]), "do not rise from 0"),
        (pack_idx(8, [6], [0], [0, 2**63 - 1, 1]), "do not rise from 0"),
        (pack_idx(8, [1, 5], [10, 0], [0, 2]), "sequence 1 does not follow on the one before it"),
        (pack_idx(8, [2, 1, 3], [8, 6, 0], [0, 1, 3]), "sequence 2 does not follow on the one before it"),
    ],
)
def test_damaged_index_is_refused(tmp_path, idx, complaint):
    with pytest.raises(CorpusError, match=complaint) as raised:
        Corpus(place(tmp_path, idx, HAND_MADE_BIN))
    assert "corpus.idx" in str(raised.value)


@pytest.mark.parametrize("bin_", [b"", HAND_MADE_BIN[:-1], HAND_MADE_BIN + b"x"], ids=["empty", "short", "long"])
def test_bin_of_another_size_is_refused(tmp_path, bin_):
    with pytest.raises(CorpusError, match=r"tools/preprocess_data\.py --force"):
        Corpus(place(tmp_path, HAND_MADE_IDX, bin_))


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16, np.int32, np.int64, np.uint16])
def test_every_token_type_round_trips(tmp_path, dtype):
    with CorpusWriter(tmp_path / "corpus", vocab_size=100, dtype=dtype) as writer:
        writer.add_documents([[99, 0, 1], [], [50]])
    corpus = Corpus(tmp_path / "corpus")
    assert corpus.dtype == dtype
    assert [corpus.read(i).tolist() for i in range(3)] == [[99, 0, 1], [], [50]]
    assert corpus.read(0).dtype == np.int64
    corpus.verify()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(documents=st.lists(st.lists(st.integers(0, 69_999), max_size=8), min_size=1, max_size=12).filter(any))
def test_any_documents_round_trip(tmp_path, documents):
    with CorpusWriter(tmp_path / "corpus", vocab_size=70_000) as writer:
        writer.add_documents(documents)
    corpus = Corpus(tmp_path / "corpus")
    assert corpus.dtype == np.int32
    assert [corpus.read(i).tolist() for i in range(corpus.documents)] == documents
    corpus.close()
