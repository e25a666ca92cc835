"""Which tokens make sample i: a pure function of (corpus fingerprint, seed, i), with no index file.

An epoch lays all documents end to end, shuffled: blocks of 1,024 neighbours in a keyed order, the documents of a
block likewise. That line is cut every seq_len tokens; sample k of the epoch is tokens [k L, k L + L], whose last
token is only a label (and the next sample's first input). A last shuffle decides in which turn the samples come.
Every token is an input at most once per epoch; the 1 to L tokens behind the last sample wait for an epoch that
lays them elsewhere. Epochs are keyed on their own and no sample spans two, so the order of the past never depends
on how long a run gets, and a loader's whole state is the number of samples consumed.

Memory beside the lengths: 8 bytes per block, and 12 more for each of the two epochs in use. A block is laid anew for
every sample, which takes the compiled kernel a few microseconds.
"""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from megazebra.data.errors import CorpusError
from megazebra.data.index.builder import native
from megazebra.data.index.documents import Documents, end_to_end
from megazebra.data.index.permutation import KeyedPermutation, derive_key

Made = TypeVar("Made")

EPOCHS_IN_USE = 2  # the one being read, and the next one, which prefetching may have reached


class Pieces(NamedTuple):
    """Pieces of documents: tokens [starts[i], starts[i] + lengths[i]) of documents[i], each length >= 1.

    All three int64 [n].
    """

    documents: NDArray[np.int64]
    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]


class SampleOrder:
    """The order of the samples of a corpus.

    seq_len: L; a sample has L + 1 tokens. fingerprint, seed: what the shuffles are keyed by. shuffle: False lays
    documents and samples in their natural order. source: what errors call the corpus.

    Safe to share between threads and forked processes.

    Raises CorpusError when the corpus has fewer than L + 1 tokens.
    """

    def __init__(
        self,
        documents: Documents,
        seq_len: int,
        seed: int = 0,
        fingerprint: str = "",
        *,
        shuffle: bool = True,
        source: str = "the corpus",
    ) -> None:
        self.documents = documents
        self.seq_len = seq_len
        self.samples_per_epoch = count_samples(documents.tokens, seq_len, source)
        self._key = derive_key(fingerprint, seed) if shuffle else None
        self._epochs: dict[int, _Epoch] = {}

    @property
    def state_bytes(self) -> int:
        """What the order keeps in memory beside the documents' lengths."""
        arrays: list[NDArray[np.integer]] = [self.documents.block_starts]
        for epoch in list(self._epochs.values()):  # a prefetching thread may add one
            arrays += [epoch.blocks, epoch.starts]
        return sum({id(array): array.nbytes for array in arrays}.values())

    def locate(self, index: int) -> Pieces:
        """The pieces of sample `index` >= 0, in order; their lengths add up to seq_len + 1.

        Neighbouring pieces are of different documents, and every piece but the first begins its document.

        Raises IndexError when `index` is negative.
        """
        if index < 0:
            raise IndexError(f"sample {index}")
        number, turn = divmod(index, self.samples_per_epoch)
        epoch = self._epochs.get(number)
        if epoch is None:
            epoch = self._lay(number)
        sample = epoch.turns(turn) if epoch.turns else turn
        return epoch.pieces(sample * self.seq_len, self.seq_len + 1)

    def _lay(self, number: int) -> _Epoch:
        """An epoch, remembered until others push it out. Threads may lay one twice, to the same result."""
        key = None if self._key is None else derive_key(self._key, number)
        return remember(self._epochs, number, _Epoch(self.documents, self.samples_per_epoch, key), EPOCHS_IN_USE)


class _Epoch:
    """The line of documents of one epoch, and the turns its samples come in; key None is the natural order.

    blocks: uint32 [blocks] in the epoch's order. starts: int64 [blocks + 1], their token positions.
    turns: from a sample's turn to its place in the line, None where they are the same.
    """

    def __init__(self, documents: Documents, samples: int, key: int | None) -> None:
        self._documents = documents
        count = len(documents.block_starts) - 1
        if key is None:
            self.turns = self._key = None
            self.blocks = np.arange(count, dtype=np.uint32)
            self.starts = documents.block_starts
        else:
            self.turns = KeyedPermutation(samples, key, "samples")
            self._key = derive_key(key, "documents")
            self.blocks = KeyedPermutation(count, key, "blocks").all().astype(np.uint32)
            self.starts = end_to_end(np.diff(documents.block_starts)[self.blocks])

    def pieces(self, position: int, length: int) -> Pieces:
        """What lies at token positions [position, position + length) of the line."""
        documents, starts = self._documents, self.starts
        if (builder := native()) is not None:
            return Pieces(
                *builder.locate(
                    documents.lengths, self.blocks, starts, documents.block_documents, self._key, position, length
                )
            )
        first = int(np.searchsorted(starts, position, side="right")) - 1
        last = int(np.searchsorted(starts, position + length, side="left"))
        laid = np.concatenate([self._lay(block) for block in self.blocks[first:last].tolist()])
        return cut_pieces(laid, documents.lengths[laid], position - int(starts[first]), length)

    def _lay(self, block: int) -> NDArray[np.int64]:
        """The documents of a block in the epoch's order, int64."""
        first = block * self._documents.block_documents
        count = min(self._documents.block_documents, len(self._documents) - first)
        members = np.arange(count) if self._key is None else KeyedPermutation(count, self._key, block).all()
        return first + members


def remember(cache: dict[int, Made], key: int, made: Made, most: int) -> Made:
    """`made`, put into the cache; beyond `most` entries the oldest leave. Other threads may do the same meanwhile."""
    cache[key] = made
    for old in list(cache)[:-most]:
        cache.pop(old, None)
    return made


def cut_pieces(documents: NDArray[np.integer], lengths: NDArray[np.integer], position: int, length: int) -> Pieces:
    """What lies at token positions [position, position + length) of these documents laid end to end."""
    starts = end_to_end(lengths)
    first = int(np.searchsorted(starts, position, side="right")) - 1
    last = int(np.searchsorted(starts, position + length, side="left"))
    begins = np.maximum(starts[first:last], position)
    taken = np.minimum(starts[first + 1 : last + 1], position + length) - begins
    filled = taken > 0
    offsets = begins - starts[first:last]
    return Pieces(documents[first:last][filled].astype(np.int64), offsets[filled], taken[filled])


def count_samples(tokens: int, seq_len: int, source: str) -> int:
    """How many samples of seq_len tokens and a label `tokens` make; CorpusError where not even one."""
    samples = (tokens - 1) // seq_len
    if samples < 1:
        raise CorpusError(
            f"{source} has {tokens} tokens, a sample needs data.seq_len + 1 = {seq_len + 1}; "
            f"lower data.seq_len or take a larger corpus"
        )
    return samples
