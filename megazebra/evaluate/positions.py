"""Loss of running text: by position in the sequence, and of the same tokens behind contexts of different lengths.

Texts are pieces of single documents of a held-out corpus, so that every token's context is of its own document.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megazebra.data.corpus.indexed_corpus import Corpus
from megazebra.errors import UserError
from megazebra.evaluate.cell import NOT_ASKED, Example, Tally, asked, fraction
from megazebra.evaluate.results import Row

FIRST_OCTAVE = 16
_LARGEST_EXPONENT = 700.0  # of e, in float64


class Pieces:
    """Some of the pieces of `length` tokens that the corpus's documents hold whole, side by side, in random order.

    samples: how many at most. Piece i is the same whatever their number.
    Raises UserError when no document is as long.
    """

    def __init__(self, corpus: Corpus, length: int, samples: int, seed: int) -> None:
        self._corpus = corpus
        self.length = length
        per_document = np.asarray(corpus.document_lengths, dtype=np.int64) // length
        ends = np.cumsum(per_document)
        if not ends[-1]:
            raise UserError(
                f"no document of {corpus.prefix} has {length:,} tokens, the longest has "
                f"{int(corpus.document_lengths.max()):,}; ask for shorter lengths or give a corpus of longer documents"
            )
        chosen = np.random.default_rng([seed, length]).permutation(ends[-1])[:samples]
        self._documents = np.searchsorted(ends, chosen, side="right")
        self._starts = (chosen - (ends - per_document)[self._documents]) * length

    def __len__(self) -> int:
        return len(self._documents)

    def __getitem__(self, index: int) -> NDArray[np.int64]:
        return self._corpus.read(int(self._documents[index]), int(self._starts[index]), self.length)


@dataclass(frozen=True)
class PositionCell:
    """The loss of pieces by position. length: inputs of a piece, which has one token more.

    edges: of the buckets, from 0 to length; bucket b holds positions [edges[b], edges[b + 1]).
    """

    pieces: Pieces
    edges: Sequence[int]

    @property
    def length(self) -> int:
        return self.pieces.length - 1

    @property
    def samples(self) -> int:
        return len(self.pieces)

    @property
    def bins(self) -> int:
        return len(self.edges) - 1

    def example(self, index: int) -> Example:
        buckets = np.searchsorted(self.edges, np.arange(self.length), side="right") - 1
        return Example(self.pieces[index], np.concatenate([[NOT_ASKED], buckets]))

    def rows(self, tally: Tally) -> list[Row]:
        spans = zip(self.edges, self.edges[1:], strict=False)
        return [_text_row("positions", self, tally, bucket, start, end) for bucket, (start, end) in enumerate(spans)]


@dataclass(frozen=True)
class ContextCell:
    """The loss of the last `final` tokens of pieces that are cut at their beginning, to leave `context` before them."""

    pieces: Pieces
    context: int
    final: int
    bins: int = 1

    @property
    def length(self) -> int:
        return self.context + self.final

    @property
    def samples(self) -> int:
        return len(self.pieces)

    def example(self, index: int) -> Example:
        return asked(self.pieces[index][-self.length :], np.arange(self.length) >= self.context, 0)

    def rows(self, tally: Tally) -> list[Row]:
        return [_text_row("contexts", self, tally, 0, self.context - 1, self.length - 1)]


def octaves(length: int) -> list[int]:
    """Edges of buckets that double: 0, 16, 32, 64, ... length."""
    edges, edge = [0], FIRST_OCTAVE
    while edge < length:
        edges.append(edge)
        edge *= 2
    return [*edges, length]


def equal_buckets(length: int, count: int) -> list[int]:
    """Edges of `count` buckets of equal size, to a token (fewer where there are fewer positions)."""
    return sorted({round(length * part / count) for part in range(count + 1)})


def position_cells(
    corpus: Corpus, lengths: Sequence[int], samples: int, seed: int, buckets: int | None = None
) -> list[PositionCell]:
    """One cell for each length; buckets: how many of equal size, None for octaves. Raises UserError as Pieces does."""
    return [
        PositionCell(
            Pieces(corpus, length + 1, samples, seed),
            octaves(length) if buckets is None else equal_buckets(length, buckets),
        )
        for length in lengths
    ]


def context_cells(corpus: Corpus, contexts: Sequence[int], final: int, samples: int, seed: int) -> list[ContextCell]:
    """One cell for each context, in tokens, all scoring the same `final` tokens of the same pieces.

    Raises UserError when a context is shorter than one token, or no document holds the longest.
    """
    if min(contexts) < 1 or final < 1:
        raise UserError(f"contexts {list(contexts)} and the {final} tokens behind them must be at least 1")
    pieces = Pieces(corpus, max(contexts) + final, samples, seed)
    return [ContextCell(pieces, context, final) for context in contexts]


def _text_row(task: str, cell: PositionCell | ContextCell, tally: Tally, bin_: int, start: int, end: int) -> Row:
    tokens = tally.tokens[bin_]
    loss = fraction(tally.loss[bin_], tokens)
    return Row(
        task=task,
        length=cell.length,
        start=start,
        end=end,
        samples=cell.samples,
        tokens=int(tokens),
        loss=loss,
        perplexity=None if loss is None else math.exp(min(loss, _LARGEST_EXPONENT)),
        token_accuracy=fraction(tally.hits[bin_], tokens),
    )
