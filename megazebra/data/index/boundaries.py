"""What document boundaries do to a sample: positions begin anew behind them, and no label reaches across one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from megazebra.data.index.builder import native
from megazebra.labels import IGNORE_INDEX


def document_positions(lengths: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
    """0, 1, ... for every document: int64 [sum of lengths]."""
    counts = np.asarray(lengths, dtype=np.int64)
    if (builder := native()) is not None:
        return builder.document_positions(counts)
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)


def labels_and_positions(
    line: NDArray[np.int64], lengths: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Labels and positions, int64 [L] each, of all tokens but the last of a line int64 [L + 1].

    The label is the token after each, IGNORE_INDEX where one of the pieces of these lengths (int64, adding up to
    L + 1) ends; positions are those of document_positions.
    """
    if (builder := native()) is not None:
        labels, positions = builder.labels_and_positions(line, lengths, IGNORE_INDEX)
        return labels, positions[:-1]
    labels = line[1:].copy()
    labels[np.cumsum(lengths[:-1]) - 1] = IGNORE_INDEX
    return labels, document_positions(lengths)[:-1]
