"""Which heads a context-parallel rank computes when heads are split over the ranks. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class HeadSplit:
    """H query heads over P ranks in order, each with the key/value heads its queries read.

    A key/value head is on as many ranks as have queries for it: on several where there are fewer of them than ranks,
    or where a rank's queries end inside a group.
    """

    heads: int
    kv_heads_in_all: int
    ranks: int

    @classmethod
    def of(cls, heads: int, kv_heads: int, ranks: int) -> HeadSplit:
        """Raises ValueError when the query heads don't divide."""
        if heads % ranks:
            raise ValueError(f"{heads} query heads per tensor-parallel rank are not divisible by {ranks} ranks")
        return cls(heads, kv_heads, ranks)

    @property
    def heads_per_rank(self) -> int:
        return self.heads // self.ranks

    def kv_heads(self, rank: int) -> range:
        """The key/value heads that the rank's queries read."""
        group, first = self.heads // self.kv_heads_in_all, rank * self.heads_per_rank
        return range(first // group, (first + self.heads_per_rank - 1) // group + 1)

    def slots(self, rank: int) -> list[int]:
        """For equal groups of the rank's queries, as kernels want them, which of its key/value heads each reads."""
        group, first, own = self.heads // self.kv_heads_in_all, rank * self.heads_per_rank, self.kv_heads(rank)
        step = math.gcd(group, self.heads_per_rank)
        return [head // group - own.start for head in range(first, first + self.heads_per_rank, step)]
