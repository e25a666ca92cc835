"""The order of samples: a bijection, every token at most once, epochs keyed on their own, pinned by golden values."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megazebra.data.errors import CorpusError
from megazebra.data.index import order as order_module
from megazebra.data.index.order import SampleOrder, Span
from megazebra.data.index.permutation import KeyedPermutation

GOLDEN_TEN = [4, 5, 1, 2, 3, 6, 7, 8, 0, 9]
GOLDEN_LARGE = [538637075274, 255460078967, 710188159595]
GOLDEN_SAMPLES = [
    ((2449, 1, 5), (2372, 0, 4)),
    ((2005, 1, 2), (1167, 0, 5), (1898, 0, 1), (1479, 0, 1)),
    ((820, 0, 1), (689, 0, 3), (691, 0, 5)),
]

document_lengths = st.lists(st.integers(0, 30), min_size=1, max_size=60).filter(lambda lengths: sum(lengths) > 8)


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(order_module, "BLOCK_DOCUMENTS", 4)


@given(size=st.integers(1, 3000), key=st.integers())
def test_permutation_is_a_bijection(size, key):
    permuted = KeyedPermutation(size, key)(np.arange(size, dtype=np.uint64))
    assert sorted(permuted.tolist()) == list(range(size))


@given(size=st.integers(1, 2**62), key=st.integers(), data=st.data())
def test_permutation_of_integers_and_arrays_agree(size, key, data):
    values = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=8))
    permutation = KeyedPermutation(size, key)
    one_by_one = [permutation(value) for value in values]
    assert permutation(np.array(values, dtype=np.uint64)).tolist() == one_by_one
    assert all(0 <= value < size for value in one_by_one)
    assert len(set(one_by_one)) == len(set(values))


def test_permutation_golden_values():
    """The order is a promise to every run under way: it may not differ between platforms or versions."""
    assert [KeyedPermutation(10, "key", 1)(i) for i in range(10)] == GOLDEN_TEN
    assert [KeyedPermutation(10**12, "key", 2)(i) for i in (0, 1, 10**12 - 1)] == GOLDEN_LARGE


def test_permutation_looks_random():
    """Neighbours scatter: about one in n keeps its successor, and positions don't correlate."""
    n = 4096
    permuted = KeyedPermutation(n, "any")(np.arange(n, dtype=np.uint64)).astype(np.int64)
    assert (np.diff(permuted) == 1).sum() < 8
    assert abs(np.corrcoef(np.arange(n), permuted)[0, 1]) < 0.06


def tokens_of(spans: list[Span]) -> list[tuple[int, int]]:
    return [(span.document, span.start + i) for span in spans for i in range(span.length)]


@settings(deadline=None)
@given(lengths=document_lengths, seq_len=st.integers(1, 8), seed=st.integers(0, 99), shuffle=st.booleans())
def test_every_token_is_an_input_at_most_once_per_epoch(lengths, seq_len, seed, shuffle):
    order = SampleOrder(np.array(lengths), seq_len, seed, "corpus", shuffle=shuffle)
    everything = {(d, i) for d, length in enumerate(lengths) for i in range(length)}
    per_epoch = order.samples_per_epoch
    for epoch in range(2):
        samples = [tokens_of(order.locate(epoch * per_epoch + i)) for i in range(per_epoch)]
        assert all(len(sample) == seq_len + 1 for sample in samples)
        inputs = [token for sample in samples for token in sample[:-1]]
        assert len(inputs) == len(set(inputs))
        assert set(inputs) <= everything
        assert 1 <= len(everything) - len(inputs) <= seq_len


@settings(deadline=None)
@given(lengths=document_lengths, seq_len=st.integers(1, 8))
def test_samples_are_chunks_of_one_line_of_documents(lengths, seq_len):
    """Put back in the order of the line, each sample begins with the token that ends the one before it."""
    order = SampleOrder(np.array(lengths), seq_len, 3, "corpus")
    samples = [tokens_of(order.locate(i)) for i in range(order.samples_per_epoch)]
    first_tokens = {sample[0]: sample for sample in samples}
    heads = set(first_tokens) - {sample[-1] for sample in samples}
    assert len(heads) == 1
    line, sample = [], first_tokens[heads.pop()]
    while sample:
        line += sample[:-1]
        last, sample = sample[-1], first_tokens.get(sample[-1])
    line.append(last)
    assert len(line) == order.samples_per_epoch * seq_len + 1
    # Documents lie whole in the line, apart from the one the tail cuts.
    for document, group in itertools.groupby(line, key=lambda token: token[0]):
        places = [place for _, place in group]
        assert places == list(range(len(places)))
        assert len(places) == lengths[document] or line[-1][0] == document


def test_blocks_hold_neighbours(small_blocks):
    order = SampleOrder(np.full(22, 3), 1, 5, "corpus")
    spans = order._spans(0, 0, 66)
    blocks = [block for block, _ in itertools.groupby(span.document // 4 for span in spans)]
    assert sorted(blocks) == list(range(6))
    assert blocks != sorted(blocks)
    assert [span.document for span in spans] != sorted(span.document for span in spans)


def test_natural_order(small_blocks):
    order = SampleOrder(np.array([3, 0, 4, 2, 0, 5]), 4, shuffle=False)
    assert order.samples_per_epoch == 3
    assert order.locate(0) == [Span(0, 0, 3), Span(2, 0, 2)]
    assert order.locate(1) == [Span(2, 1, 3), Span(3, 0, 2)]
    assert order.locate(2) == [Span(3, 1, 1), Span(5, 0, 4)]


def test_samples_depend_on_nothing_but_corpus_seed_and_index():
    lengths = np.random.default_rng(0).integers(0, 50, 5000)
    fresh = [SampleOrder(lengths, 16, 7, "corpus").locate(i) for i in (0, 5, 100_000)]
    order = SampleOrder(lengths, 16, 7, "corpus")
    for i in (99, 100_000, 3, 250_000, 5, 0):
        order.locate(i)
    assert [order.locate(i) for i in (0, 5, 100_000)] == fresh
    assert [SampleOrder(lengths, 16, 8, "corpus").locate(i) for i in (0, 5, 100_000)] != fresh
    assert [SampleOrder(lengths, 16, 7, "other").locate(i) for i in (0, 5, 100_000)] != fresh


def test_epochs_are_shuffled_differently():
    order = SampleOrder(np.full(300, 10), 4, 0, "corpus")
    n = order.samples_per_epoch
    first, second = ([order.locate(epoch * n + i) for i in range(n)] for epoch in (0, 1))
    assert first != second


def test_golden_samples():
    """As for the permutation: changing these breaks every run that resumes."""
    order = SampleOrder(np.arange(3000) % 7, 8, 1234, "golden")
    assert [tuple(map(tuple, order.locate(i))) for i in (0, 1, order.samples_per_epoch)] == GOLDEN_SAMPLES


def test_corpus_smaller_than_a_sample_is_refused():
    with pytest.raises(CorpusError, match=r"'tiny' has 8 tokens, a sample needs data\.seq_len \+ 1 = 9"):
        SampleOrder(np.array([8]), 8, source="'tiny'")
    with pytest.raises(CorpusError):
        SampleOrder(np.array([], dtype=np.int64), 8)
    assert SampleOrder(np.array([9]), 8).locate(0) == [Span(0, 0, 9)]


def test_counts_beyond_32_bits():
    """int32 lengths whose sum needs 34 bits, and positions far behind 2^31."""
    lengths = np.full(8, 2**31 - 1, dtype=np.int32)
    order = SampleOrder(lengths, 4096, 0, "corpus", shuffle=False)
    assert order.tokens == 8 * (2**31 - 1)
    last = order.samples_per_epoch - 1
    assert order.locate(last) == [Span(7, last * 4096 - 7 * (2**31 - 1), 4097)]


def test_memory_is_blocks_not_documents():
    order = SampleOrder(np.full(200_000, 2, dtype=np.int32), 8, 0, "corpus")
    for i in range(500):
        order.locate(i * 97)
    assert len(order._blocks) <= order_module.CACHED_BLOCKS
    assert len(order._epochs) <= order_module.CACHED_EPOCHS
