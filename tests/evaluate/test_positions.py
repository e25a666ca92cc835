"""Loss by position and context: which tokens of which documents are scored, and where."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from stand_ins import random_corpus

from megazebra.errors import UserError
from megazebra.evaluate.cell import NOT_ASKED, Tally
from megazebra.evaluate.positions import Pieces, context_cells, equal_buckets, octaves, position_cells

LENGTHS = [40, 7, 90, 33, 21]


def test_pieces_lie_in_single_documents_side_by_side(tmp_path: Path) -> None:
    corpus = random_corpus(tmp_path / "corpus", LENGTHS, 1000)
    pieces = Pieces(corpus, 20, 100, seed=0)
    whole = [corpus.read(document) for document in range(corpus.documents)]
    expected = {tuple(document[i : i + 20]) for document in whole for i in range(0, len(document) - 19, 20)}
    assert len(pieces) == len(expected) == 2 + 0 + 4 + 1 + 1
    assert {tuple(pieces[i].tolist()) for i in range(len(pieces))} == expected
    few = Pieces(corpus, 20, 3, seed=0)
    assert len(few) == 3
    assert all(np.array_equal(few[i], pieces[i]) for i in range(3))
    assert any(not np.array_equal(Pieces(corpus, 20, 3, seed=1)[i], few[i]) for i in range(3))


def test_every_position_has_its_bucket(tmp_path: Path) -> None:
    corpus = random_corpus(tmp_path / "corpus", LENGTHS, 1000)
    (cell,) = position_cells(corpus, [40], samples=5, seed=0)
    assert octaves(40) == list(cell.edges) == [0, 16, 32, 40]
    assert octaves(16) == [0, 16]
    assert equal_buckets(40, 3) == [0, 13, 27, 40]
    example = cell.example(0)
    assert len(example.tokens) == 41, "every one of the 40 inputs has a label"
    assert example.bins.tolist() == [NOT_ASKED, *[0] * 16, *[1] * 16, *[2] * 8]
    rows = cell.rows(Tally(np.array([32.0, 32, 16]), np.array([64.0, 32, 4]), np.array([8.0, 16, 12])))
    assert [(row.start, row.end, row.tokens) for row in rows] == [(0, 16, 32), (16, 32, 32), (32, 40, 16)]
    assert [(row.loss, row.token_accuracy, row.exact_match) for row in rows] == [
        (2, 0.25, None), (1, 0.5, None), (0.25, 0.75, None),
    ]  # fmt: skip
    assert rows[1].perplexity == pytest.approx(np.e)


def test_contexts_score_the_same_tokens(tmp_path: Path) -> None:
    corpus = random_corpus(tmp_path / "corpus", LENGTHS, 1000)
    cells = context_cells(corpus, [1, 5, 30], final=10, samples=3, seed=0)
    for index in range(cells[0].samples):
        examples = [cell.example(index) for cell in cells]
        assert [len(example.tokens) for example in examples] == [11, 15, 40]
        scored = [example.tokens[example.bins != NOT_ASKED] for example in examples]
        assert all(len(tokens) == 10 and np.array_equal(tokens, scored[0]) for tokens in scored)
        for example in examples[:2]:
            assert np.array_equal(example.tokens, examples[-1].tokens[-len(example.tokens) :])
    (row,) = cells[1].rows(Tally(*np.ones((3, 1))))
    assert (row.length, row.start, row.end) == (15, 4, 14)


def test_what_cannot_be_is_told(tmp_path: Path) -> None:
    corpus = random_corpus(tmp_path / "corpus", LENGTHS, 1000)
    with pytest.raises(UserError, match=r"no document of .*corpus has 91 tokens, the longest has 90; ask for shorter"):
        position_cells(corpus, [90], samples=1, seed=0)
    with pytest.raises(UserError, match=r"contexts \[0, 4\] and the 2 tokens behind them must be at least 1"):
        context_cells(corpus, [0, 4], final=2, samples=1, seed=0)
