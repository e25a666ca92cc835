"""Best-fit packing against a slow one, and the packed order: nothing lost, nothing too long, nothing remembered."""

from __future__ import annotations

import itertools
import math
import pickle
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megazebra.data.errors import CorpusError
from megazebra.data.index import builder, packing
from megazebra.data.index.best_fit import pack_best_fit
from megazebra.data.index.documents import Documents
from megazebra.data.index.packing import PackedOrder

pytestmark = pytest.mark.usefixtures("each_builder")

GOLDEN_SAMPLES = [
    [(1667, 0, 17), (7347, 0, 47)],
    [(2970, 0, 20), (5194, 0, 44)],
    [(3429, 0, 29), (4785, 0, 35)],
]

documents = st.lists(st.integers(0, 40), min_size=1, max_size=60).filter(any)


def packed(lengths, capacity, remainder=0):
    items, starts = pack_best_fit(np.array(lengths, dtype=np.int64), capacity, remainder)
    return [items[start:end].tolist() for start, end in itertools.pairwise(starts)]


def slowly_packed(lengths, capacity, remainder=0):
    """The rule word by word: every bin is looked at for every item."""
    bins: list[dict] = [{"space": remainder, "items": [], "changed": -1}] if remainder else []
    for turn, item in enumerate(sorted(range(len(lengths)), key=lambda item: (-lengths[item], item))):
        roomy = [bin_ for bin_ in bins if bin_["space"] >= lengths[item]]
        if not roomy:
            roomy = [{"space": capacity, "items": [], "changed": turn}]
            bins += roomy
        chosen = min(roomy, key=lambda bin_: (bin_["space"], -bin_["changed"]))
        chosen["items"].append(item)
        chosen["space"] -= lengths[item]
        chosen["changed"] = turn
    return sorted(sorted(bin_["items"]) for bin_ in bins)


@given(capacity=st.integers(1, 200), data=st.data())
def test_packs_as_the_rule_says(capacity, data):
    lengths = data.draw(st.lists(st.integers(1, capacity), max_size=80))
    assert packed(lengths, capacity) == slowly_packed(lengths, capacity)


@given(capacity=st.integers(2, 200), data=st.data())
def test_a_bin_with_the_room_of_a_remainder(capacity, data):
    lengths = data.draw(st.lists(st.integers(1, capacity), max_size=80))
    remainder = data.draw(st.integers(1, capacity - 1))
    first, *others = packed(lengths, capacity, remainder)
    assert sum(lengths[item] for item in first) <= remainder
    assert sorted([first, *others]) == slowly_packed(lengths, capacity, remainder)
    assert others == sorted(others)


@pytest.mark.parametrize("capacity", [1, 63, 64, 65, 4095, 4096, 4097, 2**18, 2**18 + 1, 2**24, 2**24 + 1])
def test_capacities_around_the_levels_of_the_bitmap(capacity):
    rng = np.random.default_rng(capacity)
    lengths = np.ceil(capacity * rng.random(300) ** 3).astype(np.int64).clip(1).tolist()
    lengths += [1, capacity, max(1, capacity - 1), (capacity + 1) // 2]
    assert packed(lengths, capacity) == slowly_packed(lengths, capacity)


def test_lengths_that_fit_no_bin_are_refused():
    message = r"2 of 4 lengths are not from 1 to 8, the room in a bin: the first is item 1 with 9 tokens"
    with pytest.raises(CorpusError, match=message):
        pack_best_fit(np.array([8, 9, 3, 0]), 8)
    with pytest.raises(CorpusError, match="item 0 with -1 tokens"):
        pack_best_fit(np.array([-1]), 8)


def test_any_integers_are_lengths():
    for dtype in (np.uint8, np.int32, np.int64):
        items, starts = pack_best_fit(np.array([3, 5, 5, 3], dtype=dtype)[::-1], 8)
        assert (items.tolist(), starts.tolist()) == ([0, 2, 1, 3], [0, 2, 4])
        assert items.dtype == starts.dtype == np.int64


def pieces_of(order, index):
    return list(zip(*(column.tolist() for column in order.locate(index)), strict=True))


@settings(deadline=None, max_examples=40)
@given(
    lengths=documents,
    seq_len=st.integers(1, 24),
    window_documents=st.integers(1, 20) | st.just(60),
    seed=st.integers(0, 99),
    shuffle=st.booleans(),
)
def test_every_token_once_per_epoch(lengths, seq_len, window_documents, seed, shuffle):
    order = PackedOrder(
        Documents(np.array(lengths), block_documents=4),
        seq_len,
        seed,
        "corpus",
        window_documents=window_documents,
        shuffle=shuffle,
    )
    pieces = [
        (document, start, min(seq_len, length - start))
        for document, length in enumerate(lengths)
        for start in range(0, length, seq_len)
    ]
    for epoch in range(2):
        samples = [pieces_of(order, epoch * order.samples_per_epoch + i) for i in range(order.samples_per_epoch)]
        assert all(1 <= sum(length for _, _, length in sample) <= seq_len for sample in samples)
        assert sorted(piece for sample in samples for piece in sample) == pieces
        assert all(sample == sorted(sample) for sample in samples)
    assert order.padding == pytest.approx(1 - sum(lengths) / (len(samples) * seq_len))


@settings(deadline=None)
@given(lengths=documents, seq_len=st.integers(1, 24), seed=st.integers(0, 99))
def test_one_window_has_the_bins_of_best_fit(lengths, seq_len, seed):
    order = PackedOrder(Documents(np.array(lengths), block_documents=4), seq_len, seed, window_documents=len(lengths))
    rests = [length % seq_len for length in lengths if length % seq_len]
    whole = sum(length // seq_len for length in lengths)
    assert order.samples_per_epoch == whole + len(slowly_packed(rests, seq_len))


def test_windows_pad_hardly_more_than_the_whole_corpus():
    """Without the pool, half a bin of 165 would be lost in each window."""
    lengths = np.random.default_rng(0).lognormal(math.log(400), 1.0, 65_536).astype(np.int32)
    layout = Documents(lengths)
    windows = PackedOrder(layout, 16_384, window_documents=4096)
    whole = PackedOrder(layout, 16_384, window_documents=65_536)
    assert windows.samples_per_epoch <= whole.samples_per_epoch + 1
    assert windows.padding < 0.0004


LENGTHS_AT_SCALE = {
    "lognormal": np.random.default_rng(0).lognormal(math.log(400), 1.2, 200_000).astype(np.int32),
    "a_thousandth_are_books": np.where(np.arange(200_000) % 1000, 100, 9_999_999),
    "all_as_long_as_a_sequence": np.append(np.full(50_000, 2**18), 1),
}


@pytest.mark.parametrize("lengths", LENGTHS_AT_SCALE.values(), ids=LENGTHS_AT_SCALE)
@pytest.mark.parametrize("seq_len", [4096, 2**18])
def test_windows_suit_the_sequences(lengths, seq_len):
    """The pool holds few documents, windows are short beside the corpus, and there is next to no padding."""
    order = PackedOrder(Documents(lengths), seq_len)
    assert order.state_bytes < 0.1 * len(lengths)
    order.locate(0)
    assert order.state_bytes < 1.5 * len(lengths)
    least = -(-order.documents.tokens // seq_len)
    assert least <= order.samples_per_epoch <= 1.0003 * least + 1


def test_few_windows_are_remembered(monkeypatch):
    monkeypatch.setattr(packing, "CACHED_DOCUMENTS", 2048)
    order = PackedOrder(Documents(np.arange(20_000) % 50), 64, window_documents=1024)
    before = order.state_bytes
    for i in range(500):
        order.locate(i)
    assert 8 * 1024 < order.state_bytes - before < 2 * 16 * 1024


def test_orders_can_be_pickled():
    order = PackedOrder(Documents(np.arange(9000) % 50), 64, 3, "corpus")
    expected = [pieces_of(order, i) for i in range(0, 4000, 97)]
    copy = pickle.loads(pickle.dumps(order))
    assert [pieces_of(copy, i) for i in range(0, 4000, 97)] == expected


def test_samples_depend_on_nothing_but_corpus_seed_and_index(monkeypatch):
    """Neither on those asked for before, nor on the windows that are still in memory."""
    layout = Documents(np.random.default_rng(0).integers(0, 50, 5000))
    order = PackedOrder(layout, 64, 7, "corpus", window_documents=1024)
    indices = [0, 5, 700, order.samples_per_epoch + 3]
    expected = [pieces_of(order, i) for i in indices]
    monkeypatch.setattr(packing, "CACHED_DOCUMENTS", 1)
    forgetful = PackedOrder(layout, 64, 7, "corpus", window_documents=1024)
    for i in (99, 1000, 3, 2500, *reversed(indices)):
        forgetful.locate(i)
    assert [pieces_of(forgetful, i) for i in indices] == expected
    for seed, fingerprint in ((8, "corpus"), (7, "other")):
        other = PackedOrder(layout, 64, seed, fingerprint, window_documents=1024)
        assert [pieces_of(other, i) for i in indices] != expected


def test_epochs_have_the_same_bins_in_different_orders():
    order = PackedOrder(Documents(np.arange(400) % 30), 64)
    n = order.samples_per_epoch
    first, second = ([pieces_of(order, epoch * n + i) for i in range(n)] for epoch in (0, 1))
    assert first != second
    assert sorted(first) == sorted(second)


def test_golden_samples():
    """The order is a promise to every run under way: it may not differ between builders, platforms or versions."""
    order = PackedOrder(Documents(np.arange(9000) % 50), 64, 1234, "golden")
    assert [pieces_of(order, i) for i in (0, 1, order.samples_per_epoch)] == GOLDEN_SAMPLES
    longer = PackedOrder(Documents(np.arange(9000) % 50), 4096, 1234, "golden")  # in longer windows
    documents = [longer.locate(i).documents for i in (0, 1, longer.samples_per_epoch)]
    assert [(len(column), column.sum()) for column in documents] == [(106, 803996), (217, 1645196), (94, 303846)]


def test_natural_order():
    """Windows of four: in each the whole pieces, then the bins of rests; last the pool."""
    order = PackedOrder(Documents(np.array([3, 21, 6, 1, 0, 10, 2, 7, 5]), 4), 10, window_documents=3, shuffle=False)
    samples = [pieces_of(order, i) for i in range(order.samples_per_epoch)]
    assert samples == [
        [(1, 0, 10)],
        [(1, 10, 10)],
        [(0, 0, 3), (1, 20, 1), (2, 0, 6)],
        [(5, 0, 10)],
        [(3, 0, 1), (6, 0, 2), (7, 0, 7)],
        [(8, 0, 5)],
    ]


def test_documents_that_may_not_be_cut():
    layout = Documents(np.array([16, 3, 17, 0, 40], dtype=np.int32))
    message = r"'chats': 2 documents are longer than data\.seq_len = 16 .* the first is document 2 with 17 tokens"
    with pytest.raises(CorpusError, match=message):
        PackedOrder(layout, 16, split=False, source="'chats'")
    order = PackedOrder(Documents(np.array([16, 3, 16])), 16, split=False)
    assert sorted(pieces_of(order, i) for i in range(3)) == [[(0, 0, 16)], [(1, 0, 3)], [(2, 0, 16)]]


@pytest.mark.parametrize(
    ("lengths", "found"), [([], "it has no documents"), ([0, 0], "all of its 2 documents are empty")]
)
def test_corpus_without_tokens_is_refused(lengths, found):
    with pytest.raises(CorpusError, match=f"'empty' has no tokens to pack, {found}; .* max_document_tokens or data.ov"):
        PackedOrder(Documents(np.array(lengths, dtype=np.int64)), 8, source="'empty'")


def test_no_sample_before_the_first():
    with pytest.raises(IndexError, match="sample -1"):
        PackedOrder(Documents(np.array([3])), 8).locate(-1)


def test_counts_beyond_32_bits():
    """2^33 samples of one document of 2^45 tokens, then its rest with another one."""
    order = PackedOrder(Documents(np.array([2**45 + 5, 3])), 4096, shuffle=False)
    assert order.samples_per_epoch == 2**33 + 1
    assert pieces_of(order, 2**33 - 1) == [(0, 2**45 - 4096, 4096)]
    assert pieces_of(order, 2**33) == [(0, 2**45, 5), (1, 0, 3)]
    shuffled = PackedOrder(Documents(np.array([2**45 + 5, 3])), 4096)
    assert len({pieces_of(shuffled, 2**34 + i)[0] for i in range(50)}) == 50


def test_sequences_of_16_million_tokens():
    lengths = np.random.default_rng(1).integers(1, 2**26, 200)
    order = PackedOrder(Documents(lengths), 2**24)
    samples = [order.locate(i) for i in range(order.samples_per_epoch)]
    assert sum(int(sample.lengths.sum()) for sample in samples) == lengths.sum()
    assert max(int(sample.lengths.sum()) for sample in samples) == 2**24


@pytest.mark.parametrize("each_builder", ["C++"], indirect=True)
def test_builders_agree():
    lengths = np.random.default_rng(2).lognormal(math.log(400), 1.5, 9000).astype(np.int32)
    compiled = PackedOrder(Documents(lengths), 4096, 3, "corpus")
    with mock.patch.object(builder, "_native", None):
        twin = PackedOrder(Documents(lengths), 4096, 3, "corpus")
        assert twin.samples_per_epoch == compiled.samples_per_epoch
        expected = [pieces_of(twin, i) for i in range(0, 3000, 37)]
    assert [pieces_of(compiled, i) for i in range(0, 3000, 37)] == expected
