"""Documents sorted into buckets by length: for histograms, and for sources that take some lengths only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megazebra.data.index.builder import native
from megazebra.data.index.documents import end_to_end, kernel_lengths


class Buckets(NamedTuple):
    """Bucket k holds documents[starts[k]:starts[k + 1]]: `documents` int64 [n], `starts` int64 [buckets + 1]."""

    documents: NDArray[np.int64]
    starts: NDArray[np.int64]


def bucket_by_length(lengths: NDArray[np.integer], bounds: Sequence[int]) -> Buckets:
    """Sorts documents into len(bounds) + 1 buckets: below bounds[0], [bounds[0], bounds[1]), ..., the last bound on.

    lengths: integers [n], tokens of each. Inside a bucket the documents keep their order. Raises ValueError when
    the bounds don't increase.
    """
    limits = np.array(bounds, dtype=np.int64)
    if (limits[1:] <= limits[:-1]).any():
        raise ValueError(f"bounds of lengths have to increase, got {limits.tolist()}; sort them and leave out doubles")
    if (builder := native()) is not None:
        return Buckets(*builder.bucket_by_length(kernel_lengths(lengths), limits))
    bucket_of = np.searchsorted(limits, lengths, side="right")
    counts = np.bincount(bucket_of, minlength=len(limits) + 1)
    return Buckets(np.argsort(bucket_of, kind="stable"), end_to_end(counts))
