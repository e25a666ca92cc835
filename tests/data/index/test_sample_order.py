"""The order of samples: every token at most once per epoch, epochs keyed on their own, pinned by golden values."""

from __future__ import annotations

import itertools
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megazebra.data.errors import CorpusError
from megazebra.data.index import builder
from megazebra.data.index.documents import Documents
from megazebra.data.index.order import Pieces, SampleOrder

NATIVE = builder.native()
GOLDEN_SAMPLES = [
    [(613, 3, 1), (590, 0, 2), (857, 0, 3), (205, 0, 2), (134, 0, 1)],
    [(1448, 0, 6), (1374, 0, 2), (1779, 0, 1)],
    [(1642, 2, 2), (1082, 0, 4), (2021, 0, 3)],
]

pytestmark = pytest.mark.usefixtures("each_builder")
document_lengths = st.lists(st.integers(0, 30), min_size=1, max_size=60).filter(lambda lengths: sum(lengths) > 8)


def order_of(lengths, seq_len, seed=0, block_documents=1024, **options) -> SampleOrder:
    return SampleOrder(Documents(np.asarray(lengths), block_documents), seq_len, seed, "corpus", **options)


def pieces(located: Pieces) -> list[tuple[int, int, int]]:
    assert all(field.dtype == np.int64 for field in located)
    return list(zip(*(field.tolist() for field in located), strict=True))


def tokens_of(located: Pieces) -> list[tuple[int, int]]:
    return [(document, start + i) for document, start, length in pieces(located) for i in range(length)]


@settings(deadline=None)
@given(
    lengths=document_lengths,
    seq_len=st.integers(1, 8),
    seed=st.integers(0, 99),
    block_documents=st.sampled_from([1, 4, 1024]),
    shuffle=st.booleans(),
)
def test_every_token_is_an_input_at_most_once_per_epoch(lengths, seq_len, seed, block_documents, shuffle):
    order = order_of(lengths, seq_len, seed, block_documents, shuffle=shuffle)
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
@given(lengths=document_lengths, seq_len=st.integers(1, 8), block_documents=st.sampled_from([4, 1024]))
def test_samples_are_chunks_of_one_line_of_documents(lengths, seq_len, block_documents):
    line = line_of(order_of(lengths, seq_len, 3, block_documents))
    # Documents lie whole in the line, apart from the one the tail cuts.
    for document, group in itertools.groupby(line, key=lambda token: token[0]):
        places = [place for _, place in group]
        assert places == list(range(len(places)))
        assert len(places) == lengths[document] or line[-1][0] == document


def line_of(order: SampleOrder) -> list[tuple[int, int]]:
    """The first epoch's samples put in line: each begins with the token that ends the one before it."""
    samples = [tokens_of(order.locate(i)) for i in range(order.samples_per_epoch)]
    first_tokens = {sample[0]: sample for sample in samples}
    heads = set(first_tokens) - {sample[-1] for sample in samples}
    assert len(heads) == 1
    line, sample = [], first_tokens[heads.pop()]
    while sample:
        line += sample[:-1]
        last, sample = sample[-1], first_tokens.get(sample[-1])
    line.append(last)
    assert len(line) == order.samples_per_epoch * order.seq_len + 1
    return line


def test_blocks_hold_neighbours():
    line = line_of(order_of([3] * 22, 1, 5, block_documents=4))
    blocks = [block for block, _ in itertools.groupby(document // 4 for document, _ in line)]
    assert sorted(blocks) == list(range(6))
    assert blocks != sorted(blocks)
    within = [document for document, _ in line if document < 4]
    assert within != sorted(within)


def test_natural_order():
    order = order_of([3, 0, 4, 2, 0, 5], 4, block_documents=4, shuffle=False)
    assert order.samples_per_epoch == 3
    assert pieces(order.locate(0)) == [(0, 0, 3), (2, 0, 2)]
    assert pieces(order.locate(1)) == [(2, 1, 3), (3, 0, 2)]
    assert pieces(order.locate(2)) == [(3, 1, 1), (5, 0, 4)]
    assert pieces(order.locate(3)) == pieces(order.locate(0))


def test_samples_depend_on_nothing_but_corpus_seed_and_index():
    documents = Documents(np.random.default_rng(0).integers(0, 50, 5000))
    asked = (0, 5, 100_000, 2**62)

    def samples(seed: int, fingerprint: str, before: tuple[int, ...] = ()) -> list[list[tuple[int, int, int]]]:
        order = SampleOrder(documents, 16, seed, fingerprint)
        return [pieces(order.locate(i)) for i in (*before, *asked)][len(before) :]

    fresh = samples(7, "corpus")
    assert samples(7, "corpus", before=(99, 100_000, 3, 250_000, 5, 0)) == fresh
    assert samples(8, "corpus") != fresh
    assert samples(7, "other") != fresh


def test_epochs_are_shuffled_differently():
    order = order_of([10] * 300, 4)
    n = order.samples_per_epoch
    first, second = ([pieces(order.locate(epoch * n + i)) for i in range(n)] for epoch in (0, 1))
    assert first != second
    assert sorted(first) != sorted(second)


def test_golden_samples():
    """As for the permutation: changing these breaks every run that resumes."""
    order = SampleOrder(Documents(np.arange(3000) % 7), 8, 1234, "golden")
    assert [pieces(order.locate(i)) for i in (0, 1, order.samples_per_epoch)] == GOLDEN_SAMPLES


@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.int64])
@pytest.mark.parametrize("stride", [1, 2])
def test_any_integer_lengths_will_do(dtype, stride):
    lengths = np.arange(3000).astype(dtype)[::stride] % 50
    order, expected = order_of(lengths, 100), order_of(lengths.tolist(), 100)
    assert [pieces(order.locate(i)) for i in range(50)] == [pieces(expected.locate(i)) for i in range(50)]


def test_documents_begin_where_those_before_them_end():
    lengths = np.random.default_rng(1).integers(0, 2**31 - 1, 5000, dtype=np.int32)
    documents = Documents(lengths)
    starts = np.cumsum(lengths, dtype=np.int64) - lengths
    assert documents.tokens == lengths.sum(dtype=np.int64)
    assert documents.block_starts.tolist() == [*starts[::1024].tolist(), documents.tokens]
    assert [documents.start(d) for d in (0, 1023, 1024, 4999)] == starts[[0, 1023, 1024, 4999]].tolist()


def test_corpus_smaller_than_a_sample_is_refused():
    with pytest.raises(CorpusError, match=r"'tiny' has 8 tokens, a sample needs data\.seq_len \+ 1 = 9"):
        order_of([8], 8, source="'tiny'")
    with pytest.raises(CorpusError):
        order_of(np.array([], dtype=np.int64), 8)
    assert pieces(order_of([9], 8).locate(0)) == [(0, 0, 9)]


def test_negative_samples():
    with pytest.raises(IndexError, match="sample -1"):
        order_of([9], 8).locate(-1)


def test_counts_beyond_32_bits():
    """int32 lengths whose sum needs 34 bits, documents of more than 2^31 tokens, and more than 2^31 samples."""
    order = SampleOrder(Documents(np.full(8, 2**31 - 1, dtype=np.int32)), 4096, shuffle=False)
    assert order.documents.tokens == 8 * (2**31 - 1)
    last = order.samples_per_epoch - 1
    assert pieces(order.locate(last)) == [(7, last * 4096 - 7 * (2**31 - 1), 4097)]

    lengths = np.array([2**33, 5, 2**40], dtype=np.int64)
    natural = order_of(lengths, 100, shuffle=False)
    assert natural.samples_per_epoch == (int(lengths.sum()) - 1) // 100 > 2**31
    assert pieces(natural.locate(2**33)) == [(2, 100 * 2**33 - 2**33 - 5, 101)]
    shuffled = order_of(lengths, 100)
    assert all(sum(length for *_, length in pieces(shuffled.locate(i))) == 101 for i in range(2**33, 2**33 + 50))


def test_memory_is_blocks_not_documents():
    """Under 1 MB for 20 M documents: 8 bytes per block, and 12 for each of two epochs."""
    order = SampleOrder(Documents(np.full(200_000, 2, dtype=np.int32)), 8)
    blocks = -(-200_000 // 1024)
    for i in range(500):
        order.locate(i * 997)
        assert order.state_bytes <= 8 * (blocks + 1) + 2 * (4 * blocks + 8 * (blocks + 1))
    assert order.state_bytes * 100 < 1e6
    natural = SampleOrder(Documents(np.full(200_000, 2, dtype=np.int32)), 8, shuffle=False)
    natural.locate(0)
    assert natural.state_bytes == 8 * (blocks + 1) + 4 * blocks


def test_threads_see_the_same_order():
    """Indices of many epochs, so that the threads push each other's epochs out."""
    lengths = np.random.default_rng(2).integers(0, 50, 5000)
    order, alone = order_of(lengths, 16), order_of(lengths, 16)
    indices = np.random.default_rng(3).integers(0, 40_000, 400).tolist()
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: pieces(order.locate(i)), indices))
    assert found == [pieces(alone.locate(i)) for i in indices]


def test_pickles():
    order = order_of([10] * 300, 4, 9)
    expected = pieces(order.locate(1234))
    assert pieces(pickle.loads(pickle.dumps(order)).locate(1234)) == expected


@pytest.mark.skipif(NATIVE is None, reason=builder.describe())
def test_both_builders_agree(monkeypatch):
    documents = np.random.default_rng(4).integers(0, 3000, 5000, dtype=np.int32)
    located = {}
    for kernels in (NATIVE, None):
        monkeypatch.setattr(builder, "_native", kernels)
        order = SampleOrder(Documents(documents), 4096, 9, "corpus")
        located[kernels] = [pieces(order.locate(i)) for i in range(0, 10_000, 101)]
    assert located[NATIVE] == located[None]
