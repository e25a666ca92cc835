"""Which tokens make sample i: a pure function of (corpus fingerprint, seed, i), with no index file.

An epoch lays all documents end to end, shuffled: blocks of 1,024 neighbours in a keyed order, the documents of a
block likewise. That line is cut every seq_len tokens; sample k of the epoch is tokens [k L, k L + L], whose last
token is only a label (and the next sample's first input). A last shuffle decides in which turn the samples come.
Every token is an input at most once per epoch; the 1 to L tokens behind the last sample wait for an epoch that
lays them elsewhere. Epochs are keyed on their own and no sample spans two, so the order of the past never depends
on how long a run gets, and a loader's whole state is the number of samples consumed.

Memory: the lengths array, 16 bytes per block and epoch in use, and the last few blocks looked into.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megazebra.data.errors import CorpusError
from megazebra.data.index.permutation import KeyedPermutation

BLOCK_DOCUMENTS = 1024
CACHED_EPOCHS = 2
CACHED_BLOCKS = 64


class Span(NamedTuple):
    """Tokens [start, start + length) of one document, length >= 1."""

    document: int
    start: int
    length: int


class Laid(NamedTuple):
    """Things laid end to end: `items` int64 [n] in their order, `starts` int64 [n + 1] their token positions."""

    items: NDArray[np.int64]
    starts: NDArray[np.int64]


Cache = dict[tuple[int, ...], Laid]


class SampleOrder:
    """The order of the samples of a corpus.

    document_lengths: integers [documents], tokens of each (held, not copied). seq_len: L; a sample has L + 1
    tokens. fingerprint, seed: what the shuffles are keyed by. shuffle: False lays documents and samples in their
    natural order. source: what errors call the corpus.

    Raises CorpusError when the corpus has fewer than L + 1 tokens.
    """

    def __init__(
        self,
        document_lengths: NDArray[np.integer],
        seq_len: int,
        seed: int = 0,
        fingerprint: str = "",
        *,
        shuffle: bool = True,
        source: str = "the corpus",
    ) -> None:
        self.document_lengths = document_lengths
        self.seq_len = seq_len
        self.seed = seed
        self.fingerprint = fingerprint
        self.shuffle = shuffle
        self.tokens = int(document_lengths.sum(dtype=np.int64))
        self.samples_per_epoch = (self.tokens - 1) // seq_len
        if self.samples_per_epoch < 1:
            raise CorpusError(
                f"{source} has {self.tokens} tokens, a sample needs data.seq_len + 1 = {seq_len + 1}; "
                f"lower data.seq_len or take a larger corpus"
            )
        block_starts = np.arange(0, len(document_lengths), BLOCK_DOCUMENTS)
        self._block_tokens = np.add.reduceat(document_lengths, block_starts, dtype=np.int64)
        self._epochs: Cache = {}
        self._blocks: Cache = {}

    def locate(self, index: int) -> list[Span]:
        """The spans of sample `index` >= 0, in order; their lengths add up to seq_len + 1.

        Neighbouring spans are of different documents, and every span but the first begins its document.
        """
        if index < 0:
            raise IndexError(f"sample {index}")
        epoch, turn = divmod(index, self.samples_per_epoch)
        sample = self._permutation(self.samples_per_epoch, epoch, "samples")(turn)
        return self._spans(epoch, sample * self.seq_len, self.seq_len + 1)

    def _spans(self, epoch: int, position: int, length: int) -> list[Span]:
        """What lies at token positions [position, position + length) of an epoch."""
        blocks, block_starts = _cached(self._epochs, self._lay_blocks, (epoch,), CACHED_EPOCHS)
        slot = int(np.searchsorted(block_starts, position, side="right")) - 1
        spans: list[Span] = []
        while length:
            block, begin = int(blocks[slot]), position - int(block_starts[slot])
            documents, starts = _cached(self._blocks, self._lay_documents, (epoch, block), CACHED_BLOCKS)
            first = int(np.searchsorted(starts, begin, side="right")) - 1
            last = int(np.searchsorted(starts[:-1], begin + length, side="left"))
            begins = np.maximum(starts[first:last], begin)
            lengths = np.minimum(starts[first + 1 : last + 1], begin + length) - begins
            offsets = begins - starts[first:last]
            for span in zip(documents[first:last].tolist(), offsets.tolist(), lengths.tolist(), strict=True):
                if span[2]:
                    spans.append(Span(*span))
            taken = int(lengths.sum())
            position, length, slot = position + taken, length - taken, slot + 1
        return spans

    def _lay_blocks(self, epoch: int) -> Laid:
        count = len(self._block_tokens)
        order = self._permutation(count, epoch, "blocks")(np.arange(count, dtype=np.uint64)).astype(np.int64)
        return Laid(order, _positions(self._block_tokens[order]))

    def _lay_documents(self, epoch: int, block: int) -> Laid:
        start = block * BLOCK_DOCUMENTS
        count = min(BLOCK_DOCUMENTS, len(self.document_lengths) - start)
        order = self._permutation(count, epoch, "documents", block)(np.arange(count, dtype=np.uint64))
        documents = order.astype(np.int64) + start
        return Laid(documents, _positions(self.document_lengths[documents]))

    def _permutation(self, size: int, epoch: int, *purpose: object) -> Callable[[Any], Any]:
        if not self.shuffle:
            return _unchanged
        return KeyedPermutation(size, self.fingerprint, self.seed, epoch, *purpose)


def _unchanged(values: Any) -> Any:
    return values


def _positions(lengths: NDArray[np.integer]) -> NDArray[np.int64]:
    """Where things of these lengths start when laid end to end, and where the last one ends: int64 [n + 1]."""
    starts = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=starts[1:])
    return starts


def _cached(cache: Cache, make: Callable[..., Laid], key: tuple[int, ...], size: int) -> Laid:
    """`make(*key)`, remembered; the oldest entries leave. Threads may make one twice, to the same result."""
    laid = cache.get(key)
    if laid is None:
        laid = cache[key] = make(*key)
        while len(cache) > size:
            cache.pop(next(iter(cache)), None)
    return laid
