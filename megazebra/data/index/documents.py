"""The lengths of a corpus's documents, and where each one begins."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from megazebra.data.index.builder import native

BLOCK_DOCUMENTS = 1024


class Documents:
    """Documents laid end to end in their natural order, in blocks of `block_documents` neighbours.

    lengths: int32 or int64 [D], tokens of each (held, not copied; other integers become int64). tokens: of all.
    block_starts: int64 [blocks + 1], the token position each block begins at, and the end of the last.
    """

    def __init__(self, lengths: NDArray[np.integer], block_documents: int = BLOCK_DOCUMENTS) -> None:
        self.lengths = kernel_lengths(lengths)
        self.block_documents = block_documents
        if (builder := native()) is not None:
            self.block_starts: NDArray[np.int64] = builder.block_starts(self.lengths, block_documents)
        else:
            firsts = range(0, len(lengths), block_documents)
            blocks = (self.lengths[first : first + block_documents].sum(dtype=np.int64) for first in firsts)
            self.block_starts = end_to_end(np.fromiter(blocks, dtype=np.int64, count=len(firsts)))
        self.tokens = int(self.block_starts[-1])

    def __len__(self) -> int:
        return len(self.lengths)

    def start(self, document: int) -> int:
        """Token position of a document's first token in the natural order."""
        block = document // self.block_documents
        before = self.lengths[block * self.block_documents : document]
        return int(self.block_starts[block]) + int(before.sum(dtype=np.int64))


def end_to_end(lengths: NDArray[np.integer]) -> NDArray[np.int64]:
    """Where things of these lengths start when laid end to end, and where the last one ends: int64 [n + 1]."""
    starts = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=starts[1:])
    return starts


def kernel_lengths(lengths: NDArray[np.integer]) -> NDArray[np.integer]:
    """The lengths as the compiled kernels take them: int32 or int64, contiguous; a copy only where they aren't."""
    dtype = lengths.dtype if lengths.dtype in (np.int32, np.int64) else np.int64
    return np.require(lengths, dtype=dtype, requirements=["C", "A"])
