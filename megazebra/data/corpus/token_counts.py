"""How often each token of a vocabulary occurs in what is written."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

BATCH_TOKENS = 2**20


class TokenCounts:
    """Counts tokens below vocab_size. Counting walks the whole vocabulary, so it is done for many tokens together."""

    def __init__(self, vocab_size: int) -> None:
        self._counts = np.zeros(vocab_size, dtype=np.int64)
        self._waiting: list[NDArray[np.integer]] = []
        self._waiting_tokens = 0

    def add(self, ids: NDArray[np.integer]) -> None:
        """Count these ids, [n], which are kept for a while."""
        for start in range(0, len(ids), BATCH_TOKENS):  # in pieces: counting makes int64 of what it counts
            piece = ids[start : start + BATCH_TOKENS]
            self._waiting.append(piece)
            self._waiting_tokens += len(piece)
            if self._waiting_tokens >= BATCH_TOKENS:
                self.total()

    def total(self) -> NDArray[np.int64]:
        """The counts so far, int64 [vocab_size]."""
        if self._waiting:
            self._counts += np.bincount(np.concatenate(self._waiting), minlength=len(self._counts))
            self._waiting, self._waiting_tokens = [], 0
        return self._counts
