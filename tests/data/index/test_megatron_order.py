"""Megatron's order, held against samples that megatron-core made and against numpy's generator."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megazebra.data.errors import CorpusError
from megazebra.data.index import builder, megatron_order
from megazebra.data.index.megatron_order import MegatronOrder
from megazebra.data.index.order import Pieces

FIXTURE = np.load(Path(__file__).parent / "fixtures" / "megatron_order.npz")
NATIVE = builder.native()
CASES = sorted({name.split("/")[0] for name in FIXTURE})


def tokens_of(located: Pieces, lengths: np.ndarray) -> list[int]:
    """Token positions in the corpus's natural order."""
    firsts = np.cumsum(lengths) - lengths
    pieces = zip(located.documents.tolist(), located.starts.tolist(), located.lengths.tolist(), strict=True)
    return [int(firsts[d]) + start + i for d, start, length in pieces for i in range(length)]


@pytest.mark.usefixtures("each_builder")
@pytest.mark.parametrize("case", CASES)
def test_equals_megatron_core(case):
    lengths, samples = FIXTURE[f"{case}/lengths"], np.cumsum(FIXTURE[f"{case}/samples"], axis=1)
    seq_len, seed, num_samples = FIXTURE[f"{case}/parameters"].tolist()
    order = MegatronOrder(lengths, seq_len, seed, num_samples)
    assert order.num_samples == len(samples) >= num_samples
    assert [tokens_of(order.locate(i), lengths) for i in range(len(samples))] == samples.tolist()


@pytest.mark.parametrize(("case", "apart"), [("final_epoch_apart", True), ("final_epoch_together", False)])
def test_the_fixture_has_both_kinds_of_final_epoch(case, apart):
    """One sample decides; apart, the 196 samples of the first epoch come before any token is repeated."""
    inputs = np.cumsum(FIXTURE[f"{case}/samples"], axis=1)[:196, :-1]
    assert (len(np.unique(inputs)) == inputs.size) == apart


@pytest.mark.skipif(NATIVE is None, reason=builder.describe())
@pytest.mark.parametrize("dtype", [np.int32, np.uint32])
@given(seed=st.integers(0, 2**32 - 1), sizes=st.lists(st.integers(0, 5000), min_size=1, max_size=3))
@settings(deadline=None)
def test_shuffles_are_numpys(dtype, seed, sizes):
    """Several in turn: each goes on where the generator was left."""
    ours, numpys = NATIVE.RandomState(seed), np.random.RandomState(seed)
    for size in sizes:
        shuffled, expected = np.arange(size, dtype=dtype), np.arange(size, dtype=dtype)
        ours.shuffle(shuffled)
        numpys.shuffle(expected)
        assert np.array_equal(shuffled, expected)


@pytest.mark.skipif(NATIVE is None, reason=builder.describe())
def test_a_shuffle_beyond_a_power_of_two_of_many_draws():
    shuffled, expected = np.arange(2**18 + 5, dtype=np.int32), np.arange(2**18 + 5, dtype=np.int32)
    NATIVE.RandomState(3).shuffle(shuffled)
    np.random.RandomState(3).shuffle(expected)
    assert np.array_equal(shuffled, expected)


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(0, 30), min_size=1, max_size=300).filter(lambda lengths: sum(lengths) > 8),
    seq_len=st.integers(1, 8),
    seed=st.integers(0, 99),
)
@pytest.mark.usefixtures("each_builder")
def test_every_token_is_an_input_at_most_once_per_epoch(lengths, seq_len, seed):
    order = MegatronOrder(np.array(lengths), seq_len, seed)
    samples = [tokens_of(order.locate(i), np.array(lengths)) for i in range(order.samples_per_epoch)]
    assert all(len(sample) == seq_len + 1 for sample in samples)
    inputs = [token for sample in samples for token in sample[:-1]]
    assert len(inputs) == len(set(inputs))
    assert set(inputs) <= set(range(sum(lengths)))
    assert 1 <= sum(lengths) - len(inputs) <= seq_len


@pytest.mark.skipif(NATIVE is None, reason=builder.describe())
def test_both_builders_agree(monkeypatch):
    lengths = np.random.default_rng(5).integers(0, 3000, 5000, dtype=np.int32)
    monkeypatch.setattr(megatron_order, "GATHERED_DOCUMENTS", 640)
    monkeypatch.setattr(builder, "_native", NATIVE)
    compiled = MegatronOrder(lengths, 4096, 9, 3000)
    found = [compiled.locate(i) for i in range(0, 3000, 7)]
    monkeypatch.setattr(builder, "_native", None)
    fallback = MegatronOrder(lengths, 4096, 9, 3000)
    for i, located in zip(range(0, 3000, 7), found, strict=True):
        for ours, theirs in zip(located, fallback.locate(i), strict=True):
            assert ours.dtype == theirs.dtype == np.int64
            assert ours.tolist() == theirs.tolist()


@pytest.mark.usefixtures("each_builder")
def test_sequences_beyond_32_bits():
    lengths = np.array([2**33 + 5, 2**32, 7])
    order = MegatronOrder(lengths, 2**20, 0)
    assert order.samples_per_epoch == order.num_samples == (int(lengths.sum()) - 1) // 2**20
    pieces: list[list[tuple[int, int]]] = [[], [], []]
    for i in range(order.num_samples):
        located = order.locate(i)
        assert located.lengths.sum() == 2**20 + 1
        for document, start, length in zip(*(field.tolist() for field in located), strict=True):
            pieces[document].append((start, start + length))
    behind = 0
    for length, parts in zip(lengths.tolist(), map(sorted, pieces), strict=True):
        ends = [end for _, end in parts]
        # Each sample begins with the token that ends the one before it.
        assert [start for start, _ in parts] == [0, *(end - 1 for end in ends[:-1])]
        behind += length - ends[-1]
    assert 0 <= behind < 2**20


@pytest.mark.usefixtures("each_builder")
def test_what_megatron_cannot_number_is_refused():
    with pytest.raises(CorpusError, match=r"'c' has 3 tokens, a sample needs data\.seq_len \+ 1 = 5"):
        MegatronOrder(np.array([3]), 4, source="'c'")
    with pytest.raises(CorpusError, match=r"seed=-1 is outside 0 to 2\^32 - 1"):
        MegatronOrder(np.array([9]), 4, -1)
    with pytest.raises(CorpusError, match=r"'c' makes 2147483650 documents over all epochs, .* numbers 2147483647"):
        MegatronOrder(np.array([1] * 10), 2, 0, (2**31 + 1) // 2, source="'c'")
    with pytest.raises(CorpusError, match=r"'c' makes 4294967296 samples"):
        MegatronOrder(np.array([2**40 + 1]), 2**8, source="'c'")


@pytest.mark.usefixtures("each_builder")
def test_samples_that_do_not_exist():
    order = MegatronOrder(np.array([9, 9]), 4, 0)
    assert order.num_samples == 4
    for index in (-1, 4):
        with pytest.raises(IndexError, match=f"sample {index} of 4"):
            order.locate(index)


def test_memory_is_less_than_megatrons():
    """Megatron keeps 4 bytes per document, 12 per sample and, while it builds, far more."""
    lengths = np.full(100_000, 400, dtype=np.int32)
    order = MegatronOrder(lengths, 4096)
    assert order.state_bytes < 4 * len(lengths) + 4 * order.num_samples + 16_000
