"""Best-fit decreasing: items into as few bins as it takes, nearly (Ding et al. 2024, arXiv:2404.10830)."""

from __future__ import annotations

from bisect import bisect_left, insort
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megazebra.data.errors import CorpusError
from megazebra.data.index.builder import native
from megazebra.data.index.documents import end_to_end


class Bins(NamedTuple):
    """The items of bin b are items[starts[b]:starts[b + 1]]: `items` int64 [n], `starts` int64 [bins + 1]."""

    items: NDArray[np.int64]
    starts: NDArray[np.int64]


def pack_best_fit(lengths: NDArray[np.integer], capacity: int, remainder: int = 0) -> Bins:
    """Packs items of these lengths into bins of `capacity`, by best-fit decreasing.

    lengths: integers [n], each from 1 to capacity, n < 2^31. The longest items come first, equal ones by their number.
    Each goes into the bin with the least space that holds it, of several the one that came to this space last, else
    into a new bin. In the result bins come in the order of their first items, and the items of a bin increase.

    remainder: when not 0, less than capacity: the room in one more bin, which is open from the start. It is the first
    one in the result, empty or not.

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
    assert 0 <= remainder < capacity
    assert len(tokens) < 2**31
    if (builder := native()) is not None:
        return Bins(*builder.pack_best_fit(tokens, capacity, remainder))
    opened, bins = _bins_as_opened(tokens, capacity, remainder)
    first_items = np.full(bins, len(tokens))
    np.minimum.at(first_items, opened, np.arange(len(tokens)))
    if remainder:
        first_items[0] = -1
    bin_of = np.argsort(np.argsort(first_items))[opened]
    return Bins(np.argsort(bin_of, kind="stable"), end_to_end(np.bincount(bin_of, minlength=bins)))


def _bins_as_opened(lengths: NDArray[np.int64], capacity: int, remainder: int) -> tuple[NDArray[np.int64], int]:
    """The bin of each item, int64 [n], and how many there are; bins are numbered as they are opened."""
    bin_of = np.zeros(len(lengths), dtype=np.int64)
    spaces = [remainder] if remainder else []  # those that occur, increasing
    bins_with = {space: [0] for space in spaces}
    opened = len(spaces)
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
    return bin_of, opened
