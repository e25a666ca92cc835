"""Whole documents packed into samples by best fit, where concatenating would cut one at the end of every sample.

A sample is a bin of documents with room for seq_len tokens (Ding et al. 2024, arXiv:2404.10830). Documents longer
than that are cut every seq_len tokens: whole pieces fill a bin each, the rest is packed with other documents. Each
window of documents, a few blocks of 1,024 neighbours in a keyed order, is packed on its own, so that finding a sample
means packing one window again. The window's emptiest bin is dissolved into a pool, which is packed at the end: the
padding is hardly more than that of packing everything at once. All epochs have the same bins, each in an order of
its own.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megazebra.data.errors import CorpusError
from megazebra.data.index.builder import native
from megazebra.data.index.documents import Documents, end_to_end
from megazebra.data.index.order import Spans
from megazebra.data.index.permutation import KeyedPermutation, derive_key

WINDOW_DOCUMENTS = 4096
CACHED_DOCUMENTS = 2**20


class Bins(NamedTuple):
    """The items of bin b are items[starts[b]:starts[b + 1]]: `items` int64 [n], `starts` int64 [bins + 1]."""

    items: NDArray[np.int64]
    starts: NDArray[np.int64]


class PackedOrder:
    """The order of the samples of a corpus whose documents are packed.

    seq_len: L; a sample has at most L tokens. fingerprint, seed: what the shuffles are keyed by. split: whether
    documents longer than L are cut. window_documents: how many are packed at once, rounded up to whole blocks; None:
    all of them. shuffle: False takes windows and their bins in natural order. source: what errors call the corpus.

    samples_per_epoch: the number of bins. Every token of the corpus is in exactly one of them.

    Memory beside the lengths: 8 bytes per block, window and pooled document, and the windows used last, up to 2^20
    documents of about 8 bytes, or one window. The pool has one bin of every window, of the shorter documents. Safe
    to share between threads and forked processes.

    Raises CorpusError when there are no tokens, or with split=False a document of more than L.
    """

    def __init__(
        self,
        documents: Documents,
        seq_len: int,
        seed: int = 0,
        fingerprint: str = "",
        *,
        split: bool = True,
        window_documents: int | None = WINDOW_DOCUMENTS,
        shuffle: bool = True,
        source: str = "the corpus",
    ) -> None:
        if documents.tokens < 1:
            raise CorpusError(f"{source} has no tokens to pack; take a larger corpus")
        too_long = np.empty(0) if split else np.flatnonzero(documents.lengths > seq_len)
        if too_long.size:
            raise CorpusError(
                f"{source}: {too_long.size} documents are longer than data.seq_len = {seq_len} and may not be cut, the "
                f"first is document {too_long[0]} with {documents.lengths[too_long[0]]} tokens; raise data.seq_len or "
                f"leave them out"
            )
        self.documents = documents
        self.seq_len = seq_len
        self._key = derive_key(fingerprint, seed) if shuffle else None
        blocks, block_documents = len(documents.block_starts) - 1, documents.block_documents
        self._blocks = np.arange(blocks) if self._key is None else KeyedPermutation(blocks, self._key, "windows").all()
        window_documents = len(documents) if window_documents is None else window_documents
        self._window_blocks = -(-window_documents // block_documents)
        cached_windows = max(1, CACHED_DOCUMENTS // (self._window_blocks * block_documents))
        self._window = lru_cache(cached_windows)(self._pack_window)
        bins: list[int] = []
        pooled: list[NDArray[np.int64]] = []
        for first_block in range(0, blocks, self._window_blocks):
            window = self._window(first_block // self._window_blocks)
            bins.append(int(window.pieces_before[-1]) + len(window.rests.starts) - 1)
            pooled.append(window.pooled)
        self._pool = self._pack_rests(np.sort(np.concatenate(pooled)))
        self._bins_before = end_to_end(np.array([*bins, len(self._pool.starts) - 1]))
        self.samples_per_epoch = int(self._bins_before[-1])

    @property
    def padding(self) -> float:
        """The share of an epoch's sequences that is left without tokens."""
        return 1 - self.documents.tokens / (self.samples_per_epoch * self.seq_len)

    def locate(self, index: int) -> Spans:
        """The spans of sample `index` >= 0, in the order of their documents; their lengths add up to at most seq_len.

        Raises IndexError when `index` is negative.
        """
        if index < 0:
            raise IndexError(f"sample {index}")
        epoch, turn = divmod(index, self.samples_per_epoch)
        place = turn if self._key is None else KeyedPermutation(self.samples_per_epoch, self._key, "bins", epoch)(turn)
        number = int(np.searchsorted(self._bins_before, place, side="right")) - 1
        place -= int(self._bins_before[number])
        if number == len(self._bins_before) - 2:
            return self._rest_spans(self._pool, place)
        window = self._window(number)
        pieces = int(window.pieces_before[-1])
        if place >= pieces:
            return self._rest_spans(window.rests, place - pieces)
        member = int(np.searchsorted(window.pieces_before, place, side="right")) - 1
        start = (place - int(window.pieces_before[member])) * self.seq_len
        return Spans(window.long[member : member + 1], np.array([start]), np.array([self.seq_len]))

    def _pack_window(self, number: int) -> _Window:
        """Window `number`: a function of the documents, the key and the number."""
        size = self.documents.block_documents
        blocks = np.sort(self._blocks[number * self._window_blocks :][: self._window_blocks])
        documents = (blocks[:, None] * size + np.arange(size)).ravel()
        documents = documents[documents < len(self.documents)]
        pieces = self._tokens(documents) // self.seq_len
        rests, starts = self._pack_rests(documents)
        pooled = rests[:0]
        if len(rests):
            fill = np.add.reduceat(self._tokens(rests) % self.seq_len, starts[:-1])
            emptiest = int(fill.argmin())
            begin, end = starts[emptiest : emptiest + 2].tolist()
            pooled = rests[begin:end]
            rests = np.delete(rests, slice(begin, end))
            starts = np.concatenate([starts[: emptiest + 1], starts[emptiest + 2 :] - len(pooled)])
        return _Window(documents[pieces > 0], end_to_end(pieces[pieces > 0]), Bins(rests, starts), pooled)

    def _pack_rests(self, documents: NDArray[np.int64]) -> Bins:
        """Bins of those of the documents of which whole pieces leave a rest."""
        rests = self._tokens(documents) % self.seq_len
        items, starts = pack_best_fit(rests[rests > 0], self.seq_len)
        return Bins(documents[rests > 0][items], starts)

    def _rest_spans(self, bins: Bins, number: int) -> Spans:
        documents = bins.items[bins.starts[number] : bins.starts[number + 1]]
        rests = self._tokens(documents) % self.seq_len
        return Spans(documents, self._tokens(documents) - rests, rests)

    def _tokens(self, documents: NDArray[np.int64]) -> NDArray[np.int64]:
        return self.documents.lengths[documents].astype(np.int64)


class _Window(NamedTuple):
    """A packed window: each whole piece is a bin, then come the bins of rests.

    long: int64, the documents that have whole pieces. pieces_before: int64 [long + 1], how many the long ones before
    each have. rests: bins of documents. pooled: int64, the documents whose rests go into the pool.
    """

    long: NDArray[np.int64]
    pieces_before: NDArray[np.int64]
    rests: Bins
    pooled: NDArray[np.int64]


def pack_best_fit(lengths: NDArray[np.integer], capacity: int) -> Bins:
    """Packs items of these lengths into bins of `capacity`, by best-fit decreasing.

    lengths: integers [n], each from 1 to capacity. The longest items come first, equal ones by their number. Each
    goes into the bin with the least space that holds it, of several the one that came to this space last, else into
    a new bin. In the result bins come in the order of their first items, and the items of a bin increase.

    The number of bins is that of the optimized best-fit decreasing of Ding et al.; the time is linear in the items,
    some tens of nanoseconds each in C++.

    Raises CorpusError when an item is empty or longer than a bin.
    """
    tokens: NDArray[np.int64] = np.ascontiguousarray(lengths, dtype=np.int64)
    unfit = np.flatnonzero((tokens < 1) | (tokens > capacity))
    if unfit.size:
        raise CorpusError(
            f"{unfit.size} of {len(tokens)} lengths are not from 1 to {capacity}, the room in a bin: the first is "
            f"item {unfit[0]} with {tokens[unfit[0]]} tokens; leave empty ones out and cut long ones"
        )
    if (builder := native()) is not None:
        return Bins(*builder.pack_best_fit(tokens, capacity))
    opened = _bins_as_opened(tokens, capacity)
    first_items = np.unique(opened, return_index=True)[1]
    bin_of = np.argsort(np.argsort(first_items))[opened]
    return Bins(np.argsort(bin_of, kind="stable"), end_to_end(np.bincount(bin_of)))


def _bins_as_opened(lengths: NDArray[np.int64], capacity: int) -> NDArray[np.int64]:
    """The bin of each item, int64 [n]; bins are numbered as they are opened."""
    bin_of = np.zeros(len(lengths), dtype=np.int64)
    spaces: list[int] = []  # those that occur, increasing
    bins_with: dict[int, list[int]] = {}
    opened = 0
    order = np.argsort(-lengths, kind="stable")
    for item, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        place = bisect_left(spaces, length)
        if place == len(spaces):
            space, bin_, opened = capacity, opened, opened + 1
        else:
            space = spaces[place]
            bin_ = bins_with[space].pop()
            if not bins_with[space]:
                del spaces[place], bins_with[space]
        bin_of[item] = bin_
        left = space - length
        if left and left not in bins_with:
            insort(spaces, left)
            bins_with[left] = []
        if left:
            bins_with[left].append(bin_)
    return bin_of
