"""Which queries each rank computes when every rank has all keys: about the same work for all. No torch.

Causal attention gives the last of P contiguous shards almost twice the mean work. Ranks therefore swap chunks of
queries for the time of a layer, until none has more than 1.05 times the mean (or chunks are a 64th of a shard).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from megazebra.data.index.balance import balance

MAX_WORK_OVER_MEAN = 1.05
_MAX_CHUNKS_PER_RANK = 64


@dataclass(frozen=True)
class Deal:
    """chunks: for every rank the queries it computes, (first, end) in the whole sequence, ascending and apart.
    local_len: queries that a rank holds, rank * local_len and on.
    work_over_mean: key-query pairs of the busiest rank over those of the mean one.
    """

    chunks: tuple[tuple[tuple[int, int], ...], ...]
    local_len: int
    work_over_mean: float

    def between(self, holder: int, computer: int) -> list[tuple[int, int]]:
        """Queries that rank `holder` holds and rank `computer` computes, counted from the holder's first one."""
        start, end = holder * self.local_len, (holder + 1) * self.local_len
        parts = ((max(first, start), min(last, end)) for first, last in self.chunks[computer])
        return [(first - start, last - start) for first, last in parts if first < last]

    def rows(self, holder: int, computer: int) -> int:
        return sum(end - first for first, end in self.between(holder, computer))

    @property
    def nothing_moves(self) -> bool:
        return all(
            chunks == ((rank * self.local_len, (rank + 1) * self.local_len),) for rank, chunks in enumerate(self.chunks)
        )

    def rows_in(self, rank: int) -> int:
        """Queries that the rank computes for others."""
        return sum(end - first for first, end in self.chunks[rank]) - self.rows(rank, rank)

    def rows_out(self, rank: int) -> int:
        """Queries of the rank's own that others compute."""
        return self.local_len - self.rows(rank, rank)


def deal_queries(document_start_BS: NDArray[np.int64] | None, seq_len: int, ranks: int, window: int | None) -> Deal:
    """Deal the queries 0..seq_len of all rows alike; document_start_BS: first key of each query's document.

    Shards stay where they are if that is even enough (local layers). Else every sequence is cut into more and more
    chunks: with two per rank and without documents, the result is the usual zigzag.
    """
    if document_start_BS is None:
        return _deal_whole(seq_len, ranks, window)
    return _deal(document_start_BS, seq_len, ranks, window)


@lru_cache(maxsize=64)
def _deal_whole(seq_len: int, ranks: int, window: int | None) -> Deal:
    return _deal(np.zeros((1, 1), np.int64), seq_len, ranks, window)


def _deal(document_start_BS: NDArray[np.int64], seq_len: int, ranks: int, window: int | None) -> Deal:
    keys_BS = np.arange(1, seq_len + 1) - document_start_BS
    if window is not None:
        keys_BS = np.minimum(keys_BS, window)
    pairs_before = np.concatenate([[0], np.cumsum(keys_BS.sum(axis=0))])
    mean = pairs_before[-1] / ranks
    best: Deal | None = None
    per_rank = 1
    while best is None or (
        best.work_over_mean > MAX_WORK_OVER_MEAN and per_rank <= min(_MAX_CHUNKS_PER_RANK, seq_len // ranks)
    ):
        edges = np.arange(ranks * per_rank + 1) * seq_len // (ranks * per_rank)
        pairs = np.diff(pairs_before[edges])
        dealt = np.arange(ranks)[:, None] if per_rank == 1 else _near_home(balance(pairs, ranks, per_rank), per_rank)
        work_over_mean = float(pairs[dealt].sum(axis=1).max() / mean)
        if best is None or work_over_mean < best.work_over_mean:
            chunks = tuple(_joined([(int(edges[i]), int(edges[i + 1])) for i in sorted(row)]) for row in dealt.tolist())
            best = Deal(chunks, seq_len // ranks, work_over_mean)
        per_rank *= 2
    return best


def _near_home(bundles: NDArray[np.int64], per_rank: int) -> NDArray[np.int64]:
    """The bundles of chunks in another order: each on the rank that holds most of it, as far as they don't compete."""
    ranks = len(bundles)
    at_home = np.stack([np.bincount(bundle // per_rank, minlength=ranks) for bundle in bundles])
    placed = np.full(ranks, -1)
    free = set(range(ranks))
    for place in np.argsort(-at_home, axis=None, kind="stable").tolist():
        bundle, rank = divmod(place, ranks)
        if bundle in free and placed[rank] < 0:
            placed[rank] = bundle
            free.remove(bundle)
    return bundles[placed]


def _joined(chunks: list[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Neighbours as one."""
    joined: list[tuple[int, int]] = []
    for first, end in chunks:
        if joined and joined[-1][1] == first:
            joined[-1] = (joined[-1][0], end)
        elif first < end:
            joined.append((first, end))
    return tuple(joined)
