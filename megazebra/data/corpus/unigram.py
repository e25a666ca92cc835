"""Token frequencies as a language model: the loss any trained model has to beat. Natural logarithms."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def unigram_entropy(counts: NDArray[np.int64]) -> float:
    """Entropy of the frequencies `counts` int64 [V] themselves, in nats per token."""
    seen = counts[counts > 0] / counts.sum()
    return float(-(seen * np.log(seen)).sum())


def unigram_cross_entropy(train_counts: NDArray[np.int64], counts: NDArray[np.int64]) -> float:
    """Loss, in nats per token, of the training frequencies on held-out tokens.

    Both int64 [V]. One is added to every training count: a token never trained on costs much, not infinity.
    """
    smoothed = train_counts + 1
    log_probability = np.log(smoothed / smoothed.sum())
    return float(-(counts * log_probability).sum() / counts.sum())
