"""Integers from whoever writes a corpus, taken as they are or refused: never rounded, never reshaped."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megazebra.data.errors import CorpusError


def as_integers(values: ArrayLike, row: tuple[int, ...], name: str, mend: str) -> NDArray[np.integer]:
    """Rows of integers, [n, *row]; an empty list is n = 0. Raises CorpusError made of `name` and `mend`."""
    try:
        array = np.asarray(values)
    except (ValueError, OverflowError) as error:  # rows of different lengths
        raise CorpusError(f"{name}: {error}; {mend}") from error
    if array.shape == (0,):
        return np.zeros((0, *row), dtype=np.int64)
    if array.dtype.kind not in "iu" or array.ndim != 1 + len(row) or array.shape[1:] != row:
        raise CorpusError(f"{name} is {array.dtype} {list(array.shape)}; {mend}")
    return array
