"""From an index to tokens and labels: a sample source is anything that gives sample i.

Two kinds of sequence are made of a corpus. Chunked: documents end to end, cut every L tokens; the label of the last
token is the first one of the next sample. Packed: whole documents (pieces of those longer than L) beside each other,
then padding; nothing is learned on the padding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from megazebra.data.corpus.indexed_corpus import Corpus
from megazebra.data.index.boundaries import document_positions, labels_and_positions
from megazebra.data.index.order import Pieces
from megazebra.labels import IGNORE_INDEX


@dataclass(frozen=True)
class Sample:
    """One training sequence of L tokens.

    tokens: int64 [L]. labels: int64 [L], the token after each, IGNORE_INDEX where none counts.
    positions: int64 [L], from 0 in every document where documents are masked, else from 0 to L - 1.
    document_lengths: tokens of each document's piece in turn, padding as the last, adding up to L.
    index: its place in the order; -1 for one that only fills a batch.
    """

    tokens: NDArray[np.int64]
    labels: NDArray[np.int64]
    positions: NDArray[np.int64]
    document_lengths: list[int]
    index: int


class SampleSource(Protocol):
    """What a loader draws from. Sample i has to be a function of i alone."""

    def __getitem__(self, index: int) -> Sample: ...

    def document_lengths(self, index: int) -> list[int]:
        """Those of sample `index`, found without reading its tokens."""
        ...


class FiniteSource(SampleSource, Protocol):
    """A source that begins anew after an epoch."""

    @property
    def samples_per_epoch(self) -> int: ...


class Order(Protocol):
    """Which pieces of documents make sample i."""

    @property
    def samples_per_epoch(self) -> int: ...

    def locate(self, index: int) -> Pieces: ...


class ChunkedSamples:
    """Samples of an order whose pieces add up to L + 1 tokens.

    document_mask: a document's last token has no label, since what follows belongs to another document, which it
    cannot see. documents: integers, the corpus's numbers of the order's documents; None: all of them.
    """

    def __init__(
        self, corpus: Corpus, order: Order, *, document_mask: bool, documents: NDArray[np.integer] | None = None
    ) -> None:
        self.corpus = corpus
        self.order = order
        self.document_mask = document_mask
        self.documents = documents

    @property
    def samples_per_epoch(self) -> int:
        return self.order.samples_per_epoch

    def __getitem__(self, index: int) -> Sample:
        pieces = self.order.locate(index)
        line = self.corpus.gather(_renamed(pieces, self.documents))
        if self.document_mask:
            labels, positions = labels_and_positions(line, pieces.lengths)
        else:
            labels, positions = line[1:], np.arange(len(line) - 1)
        return Sample(line[:-1], labels, positions, _without_last_token(pieces.lengths), index)

    def document_lengths(self, index: int) -> list[int]:
        return _without_last_token(self.order.locate(index).lengths)


class PackedSamples:
    """Samples of an order whose pieces add up to at most seq_len tokens, filled up with padding.

    padding_id: token of the padding. assistant_only: count only labels inside the corpus's assistant spans.
    documents: as in ChunkedSamples.
    """

    def __init__(
        self,
        corpus: Corpus,
        order: Order,
        seq_len: int,
        *,
        padding_id: int = 0,
        assistant_only: bool = False,
        documents: NDArray[np.integer] | None = None,
    ) -> None:
        self.corpus = corpus
        self.order = order
        self.seq_len = seq_len
        self.padding_id = padding_id
        self.assistant_only = assistant_only
        self.documents = documents

    @property
    def samples_per_epoch(self) -> int:
        return self.order.samples_per_epoch

    def __getitem__(self, index: int) -> Sample:
        pieces = _renamed(self.order.locate(index), self.documents)
        # A piece that its document goes on behind has a label for its last token: the document's next one.
        goes_on = pieces.starts + pieces.lengths < self.corpus.document_lengths[pieces.documents]
        read = pieces._replace(lengths=pieces.lengths + goes_on)
        line = self.corpus.gather(read)
        following = np.append(labels_and_positions(line, read.lengths)[0], IGNORE_INDEX)
        if self.assistant_only:
            following[~np.append(self._in_assistant_spans(read)[1:], False)] = IGNORE_INDEX
        is_input = np.ones(len(line), dtype=np.bool_)
        is_input[np.cumsum(read.lengths)[goes_on] - 1] = False
        used = int(pieces.lengths.sum())
        tokens = np.full(self.seq_len, self.padding_id, dtype=np.int64)
        labels = np.full(self.seq_len, IGNORE_INDEX, dtype=np.int64)
        tokens[:used] = line[is_input]
        labels[:used] = following[is_input]
        lengths = self._with_padding(pieces)
        return Sample(tokens, labels, document_positions(lengths), lengths, index)

    def document_lengths(self, index: int) -> list[int]:
        return self._with_padding(self.order.locate(index))

    def _with_padding(self, pieces: Pieces) -> list[int]:
        lengths: list[int] = pieces.lengths.tolist()
        padding = self.seq_len - sum(lengths)
        return [*lengths, padding] if padding else lengths

    def _in_assistant_spans(self, pieces: Pieces) -> NDArray[np.bool_]:
        """For every token of the pieces, laid end to end, whether the assistant says it."""
        said = np.zeros(int(pieces.lengths.sum()), dtype=np.bool_)
        position = 0
        for document, start, length in zip(*(column.tolist() for column in pieces), strict=True):
            for first, end in (self.corpus.spans(document) - start).clip(0, length).tolist():
                said[position + first : position + end] = True
            position += length
        return said


def _renamed(pieces: Pieces, documents: NDArray[np.integer] | None) -> Pieces:
    if documents is None:
        return pieces
    return pieces._replace(documents=documents[pieces.documents].astype(np.int64))


def _without_last_token(lengths: NDArray[np.int64]) -> list[int]:
    *whole, last = lengths.tolist()
    return [*whole, last - 1] if last > 1 else whole
