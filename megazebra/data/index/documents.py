"""The lengths of a corpus's documents, and where each one begins."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

BLOCK_DOCUMENTS = 1024


class Documents:
    """Documents laid end to end in their natural order, in blocks of 1,024.

    lengths: int32 or int64 [D], tokens of each (held, not copied). tokens: of all.
    block_starts: int64 [blocks + 1], the token position each block begins at, and the end of the last.
    """

    def __init__(self, lengths: NDArray[np.integer]) -> None:
        self.lengths = lengths
        blocks = np.arange(0, len(lengths), BLOCK_DOCUMENTS)
        self.block_starts = np.zeros(len(blocks) + 1, dtype=np.int64)
        if len(blocks):
            np.cumsum(np.add.reduceat(lengths, blocks, dtype=np.int64), out=self.block_starts[1:])
        self.tokens = int(self.block_starts[-1])

    def __len__(self) -> int:
        return len(self.lengths)

    def start(self, document: int) -> int:
        """Token position of a document's first token in the natural order."""
        block = document // BLOCK_DOCUMENTS
        before = self.lengths[block * BLOCK_DOCUMENTS : document]
        return int(self.block_starts[block]) + int(before.sum(dtype=np.int64))
