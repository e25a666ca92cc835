"""Who computes which heads and which queries, against plain loops."""

from __future__ import annotations

import numpy as np
import pytest

from megazebra.context.dealing import MAX_WORK_OVER_MEAN, deal_queries
from megazebra.context.heads import HeadSplit


@pytest.mark.parametrize(("heads", "kv_heads", "ranks"), [
    (8, 8, 4), (8, 2, 4), (8, 1, 8), (12, 3, 2), (12, 3, 4), (12, 4, 6), (32, 8, 8), (64, 8, 16), (6, 6, 3),
])  # fmt: skip
def test_every_query_head_finds_its_key_head(heads: int, kv_heads: int, ranks: int) -> None:
    split = HeadSplit.of(heads, kv_heads, ranks)
    for rank in range(ranks):
        own, slots = split.kv_heads(rank), split.slots(rank)
        group, rest = divmod(split.heads_per_rank, len(slots))
        assert rest == 0
        # What a kernel reads for the rank's query head i is slot i // group.
        read = [own[slots[i // group]] for i in range(split.heads_per_rank)]
        wanted = [(rank * split.heads_per_rank + i) // (heads // kv_heads) for i in range(split.heads_per_rank)]
        assert read == wanted
        assert sorted(set(wanted)) == list(own), "nothing is sent that is not read"


def test_heads_that_do_not_divide() -> None:
    with pytest.raises(ValueError, match="10 query heads per tensor-parallel rank are not divisible by 4 ranks"):
        HeadSplit.of(10, 2, 4)


def work(document_start: np.ndarray, chunks: tuple[tuple[int, int], ...], window: int | None) -> int:
    pairs = 0
    for row in document_start:
        for first, end in chunks:
            for query in range(first, end):
                keys = query - int(row[query]) + 1
                pairs += keys if window is None else min(keys, window)
    return pairs


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
@pytest.mark.parametrize("window", [None, 40])
def test_every_query_is_computed_once_and_the_work_is_even(ranks: int, window: int | None) -> None:
    random = np.random.default_rng(ranks)
    seq_len = 72 * ranks
    for documents in (1, 2, 5, 12):
        starts = []
        for _ in range(2):
            cuts = np.sort(random.choice(np.arange(1, seq_len), documents - 1, replace=False))
            starts.append(np.repeat([0, *cuts], np.diff([0, *cuts, seq_len])))
        document_start = np.stack(starts)
        deal = deal_queries(document_start, seq_len, ranks, window)
        computed = sorted(query for chunks in deal.chunks for first, end in chunks for query in range(first, end))
        assert computed == list(range(seq_len))
        each = [work(document_start, chunks, window) for chunks in deal.chunks]
        assert deal.work_over_mean == pytest.approx(max(each) * ranks / sum(each))
        assert deal.work_over_mean <= MAX_WORK_OVER_MEAN
        for holder in range(ranks):
            held = [range(holder * 72 + a, holder * 72 + b) for c in range(ranks) for a, b in deal.between(holder, c)]
            assert sorted(q for part in held for q in part) == list(range(holder * 72, holder * 72 + 72))


@pytest.mark.parametrize("ranks", [2, 4, 5, 8])
def test_one_long_document_gives_the_zigzag(ranks: int) -> None:
    deal = deal_queries(None, 20 * ranks, ranks, None)
    size = 10
    assert set(deal.chunks) == {
        chunks if chunks[0][1] < chunks[1][0] else ((chunks[0][0], chunks[1][1]),)
        for chunks in (
            ((i * size, i * size + size), ((2 * ranks - 1 - i) * size, (2 * ranks - i) * size)) for i in range(ranks)
        )
    }
    assert deal.work_over_mean == 1
    assert max(deal.rows_in(rank) for rank in range(ranks)) == size, "a rank keeps half of its queries"


def test_windowed_work_stays_where_it_is() -> None:
    deal = deal_queries(None, 32768, 8, 512)
    assert deal.chunks == tuple(((rank * 4096, (rank + 1) * 4096),) for rank in range(8))
    assert deal.rows_in(3) == deal.rows_out(3) == 0
