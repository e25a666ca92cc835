"""Corpora written by megatron-core itself (make_megatron_files.py), held against what its own reader found in them."""

from __future__ import annotations

import json
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import pytest

from megazebra.data.corpus.corpus_writer import CorpusWriter
from megazebra.data.corpus.indexed_corpus import Corpus

FIXTURES = Path(__file__).parent / "fixtures"
FOUND = json.loads((FIXTURES / "megatron_files.json").read_bytes())["corpora"]


def documents(name: str) -> list[list[int]]:
    sequences, boundaries = FOUND[name]["sequences"], FOUND[name]["boundaries"]
    return [list(chain(*sequences[first:last])) for first, last in pairwise(boundaries)]


@pytest.mark.parametrize("name", FOUND)
def test_documents_are_megatrons(name):
    corpus = Corpus(FIXTURES / name)
    assert corpus.dtype == FOUND[name]["dtype"]
    assert [corpus.read(i).tolist() for i in range(corpus.documents)] == documents(name)


@pytest.mark.parametrize("name", FOUND)
def test_sequences_are_megatrons(name):
    corpus = Corpus(FIXTURES / name, by_sequence=True)
    assert [corpus.read(i).tolist() for i in range(corpus.documents)] == FOUND[name]["sequences"]
    assert corpus.fingerprint == Corpus(FIXTURES / name).fingerprint


# Our writer knows no documents of several sequences, no sequences without tokens and no modes, and it counts how
# often each id of the vocabulary occurs.
WRITABLE = [name for name in FOUND if name not in ("sequences", "multimodal", "merged", "largest_ids")]


@pytest.mark.parametrize("name", WRITABLE)
def test_writer_makes_the_same_bytes(name, tmp_path):
    dtype = np.dtype(FOUND[name]["dtype"])
    with CorpusWriter(tmp_path / "ours", vocab_size=max(map(max, FOUND[name]["sequences"])) + 1, dtype=dtype) as writer:
        writer.add_documents(documents(name))
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"ours{suffix}").read_bytes() == (FIXTURES / f"{name}{suffix}").read_bytes(), suffix


def test_fixtures_hold_what_they_are_for():
    """Empty documents first, in the middle and last; several sequences, one of them empty; modes."""
    small = [len(document) for document in documents("small_vocabulary")]
    assert small[0] == small[-1] == 0 < min(small[1], small[2])
    assert 0 in small[2:-2]
    assert [] in FOUND["sequences"]["sequences"]
    assert len(FOUND["multimodal"]["sequences"]) > len(FOUND["multimodal"]["boundaries"]) - 1
    assert (FIXTURES / "multimodal.idx").read_bytes()[-3:] == bytes([0, 1, 1])
