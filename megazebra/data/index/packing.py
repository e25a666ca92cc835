"""Whole documents packed into samples by best fit, where concatenating would cut one at the end of every sample.

A sample is a bin of documents with room for seq_len tokens, filled as best_fit.py says. Documents longer than that
are cut every seq_len tokens: whole pieces fill a bin each, the rest is packed with other documents. Each window of
documents, some blocks of 1,024 neighbours in a keyed order, is packed on its own, so that finding a sample means
packing one window again. All epochs have the same bins, each in an order of its own.

A window's tokens hardly ever fill whole bins. So that this costs no padding, a bin with room for just the remainder is
filled along with the others, and goes into a pool that is packed at the end: best fit gives it the longest documents
that it can hold, hence few. Of the other bins one at most is at most half full; it goes into the pool too.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megazebra.data.errors import CorpusError
from megazebra.data.index.best_fit import Bins, pack_best_fit
from megazebra.data.index.documents import Documents, end_to_end
from megazebra.data.index.order import Pieces, remember
from megazebra.data.index.permutation import KeyedPermutation, derive_key

# A window has at least this many of both. More documents: less padding where few of them fill a sample. More sequences:
# fewer documents in the pool where many do. Both make `locate` slower.
WINDOW_DOCUMENTS = 4096
WINDOW_SEQUENCES = 32
CACHED_DOCUMENTS = 2**16
COUNTED_DOCUMENTS = 2**16  # at once, since counting takes memory


class PackedOrder:
    """The order of the samples of a corpus whose documents are packed.

    seq_len: L; a sample has at most L tokens. fingerprint, seed: what the shuffles are keyed by. split: whether
    documents longer than L are cut. window_documents: how many are packed at once, rounded up to whole blocks; None:
    4,096, or as many as hold 32 L tokens, counting at most L of each. shuffle: False takes windows and their bins in
    natural order. source: what errors call the corpus.

    samples_per_epoch: the number of bins. Every token of the corpus is in exactly one of them.

    Construction packs everything once, in C++ some 50 ns per document. So does `locate` with one window, unless the
    last ones used, up to 2^16 documents or one window, hold the sample. Memory beside the lengths: 8 bytes per block,
    window, pooled document and document of those windows. The pool gets less than 1.5 bins of each window: of
    lognormal lengths (median 400, sigma 1.2) 0.6 % of the documents at L = 4,096, 0.05 % at a million.

    Safe to share between threads and forked processes.

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
        window_documents: int | None = None,
        shuffle: bool = True,
        source: str = "the corpus",
    ) -> None:
        if documents.tokens < 1:
            found = f"all of its {len(documents)} documents are empty" if len(documents) else "it has no documents"
            raise CorpusError(
                f"{source} has no tokens to pack, {found}; prepare it anew from files with text, or let in the longer "
                f"documents that max_document_tokens or data.overlong leaves out"
            )
        if not split and documents.lengths.max() > seq_len:
            too_long = np.flatnonzero(documents.lengths > seq_len)
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
        self._window_blocks = -(-(window_documents or _window_documents(documents, seq_len)) // block_documents)
        self._windows: dict[int, _Window] = {}
        bins: list[int] = []
        pooled: list[NDArray[np.int64]] = []
        for number in range(-(-blocks // self._window_blocks)):
            window = self._pack_window(number)
            bins.append(int(window.pieces_before[-1]) + len(window.rests.starts) - 1)
            pooled.append(window.pooled)
        self._pool = self._pack_pool(np.sort(np.concatenate(pooled)))
        self._bins_before = end_to_end(np.array([*bins, len(self._pool.starts) - 1]))
        self.samples_per_epoch = int(self._bins_before[-1])

    @property
    def state_bytes(self) -> int:
        """What the order keeps in memory beside the documents' lengths."""
        arrays = [self.documents.block_starts, self._blocks, self._bins_before, *self._pool]
        for window in list(self._windows.values()):  # a prefetching thread may add one
            arrays += [window.long, window.pieces_before, *window.rests, window.pooled]
        return sum(array.nbytes for array in arrays)

    @property
    def padding(self) -> float:
        """The share of an epoch's sequences that is left without tokens."""
        return 1 - self.documents.tokens / (self.samples_per_epoch * self.seq_len)

    def locate(self, index: int) -> Pieces:
        """The pieces of sample `index` >= 0, in the order of their documents; their lengths add up to at most seq_len.

        Raises IndexError when `index` is negative.
        """
        if index < 0:
            raise IndexError(f"sample {index}")
        epoch, turn = divmod(index, self.samples_per_epoch)
        place = turn if self._key is None else KeyedPermutation(self.samples_per_epoch, self._key, "bins", epoch)(turn)
        number = int(np.searchsorted(self._bins_before, place, side="right")) - 1
        place -= int(self._bins_before[number])
        if number == len(self._bins_before) - 2:
            return self._rest_pieces(self._pool, place)
        window = self._window(number)
        pieces = int(window.pieces_before[-1])
        if place >= pieces:
            return self._rest_pieces(window.rests, place - pieces)
        member = int(np.searchsorted(window.pieces_before, place, side="right")) - 1
        start = (place - int(window.pieces_before[member])) * self.seq_len
        return Pieces(window.long[member : member + 1], np.array([start]), np.array([self.seq_len]))

    def _window(self, number: int) -> _Window:
        """A window, remembered until others push it out. Threads may pack one twice, to the same result."""
        window = self._windows.get(number)
        if window is None:
            most = max(1, CACHED_DOCUMENTS // (self._window_blocks * self.documents.block_documents))
            window = remember(self._windows, number, self._pack_window(number), most)
        return window

    def _pack_window(self, number: int) -> _Window:
        """Window `number`: a function of the documents, the key and the number."""
        size = self.documents.block_documents
        blocks = np.sort(self._blocks[number * self._window_blocks :][: self._window_blocks])
        documents = (blocks[:, None] * size + np.arange(size)).ravel()
        documents = documents[: np.searchsorted(documents, len(self.documents))]
        lengths = self._lengths(documents)
        pieces = lengths // self.seq_len
        long = np.flatnonzero(pieces)
        rests = lengths - pieces * self.seq_len
        with_rest = np.flatnonzero(rests)
        rests = rests[with_rest]
        # A single window has nobody to share a pool with.
        remainder = int(rests.sum()) % self.seq_len if len(self._blocks) > self._window_blocks else 0
        items, starts = pack_best_fit(rests, self.seq_len, remainder)
        to_pool = 2 * np.diff(end_to_end(rests[items])[starts]) <= self.seq_len
        if remainder:
            to_pool[0] = True
        counts = np.diff(starts)
        item_to_pool = np.repeat(to_pool, counts)
        items = with_rest[items]
        return _Window(
            long=documents[long],
            pieces_before=end_to_end(pieces[long]),
            rests=Bins(documents[items[~item_to_pool]], end_to_end(counts[~to_pool])),
            pooled=documents[items[item_to_pool]],
        )

    def _pack_pool(self, documents: NDArray[np.int64]) -> Bins:
        items, starts = pack_best_fit(self._lengths(documents) % self.seq_len, self.seq_len)
        return Bins(documents[items], starts)

    def _rest_pieces(self, bins: Bins, number: int) -> Pieces:
        documents = bins.items[bins.starts[number] : bins.starts[number + 1]]
        lengths = self._lengths(documents)
        rests = lengths % self.seq_len
        return Pieces(documents, lengths - rests, rests)

    def _lengths(self, documents: NDArray[np.int64]) -> NDArray[np.int64]:
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


def _window_documents(documents: Documents, seq_len: int) -> int:
    """How many are packed at once. A long document counts as one sequence: its rest is what there is to pack."""
    tokens = 0
    for first in range(0, len(documents), COUNTED_DOCUMENTS):
        tokens += int(np.minimum(documents.lengths[first : first + COUNTED_DOCUMENTS], np.int64(seq_len)).sum())
    return max(WINDOW_DOCUMENTS, -(-WINDOW_SEQUENCES * seq_len * len(documents) // tokens))
