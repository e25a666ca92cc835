"""Dealing samples to ranks: all dealt, evenly, and as well as the docstring promises."""

from __future__ import annotations

import math
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megazebra.data.index import builder
from megazebra.data.index.balance import balance
from megazebra.data.index.best_fit import pack_best_fit

pytestmark = pytest.mark.usefixtures("each_builder")


@st.composite
def steps(draw, micro_batch_sizes):
    """(costs, ranks, micro_batch_size); costs are integers, whose sums are exact."""
    ranks, micro = draw(st.integers(1, 6)), draw(micro_batch_sizes)
    count = ranks * micro * draw(st.integers(0, 5))
    costs = draw(st.lists(st.integers(0, 50), min_size=count, max_size=count))
    return np.array(costs, dtype=np.float64), ranks, micro


def micro_batch_costs(costs, dealt, micro):
    """[ranks, micro-batches]"""
    return costs[dealt].reshape(len(dealt), -1, micro).sum(2)


@given(step=steps(st.integers(1, 4)))
def test_every_sample_goes_to_one_rank(step):
    costs, ranks, micro = step
    dealt = balance(costs, ranks, micro)
    assert dealt.shape == (ranks, len(costs) // ranks)
    assert dealt.dtype == np.int64
    assert sorted(dealt.ravel().tolist()) == list(range(len(costs)))


@given(step=steps(st.integers(1, 4)))
def test_micro_batches_hold_samples_of_similar_cost(step):
    """No sample of a micro-batch is dearer than any sample of the one before."""
    costs, ranks, micro = step
    by_turn = costs[balance(costs, ranks, micro)].reshape(ranks, -1, micro).swapaxes(0, 1).reshape(-1, ranks * micro)
    assert (by_turn[1:].max(1) <= by_turn[:-1].min(1)).all()


@given(step=steps(st.just(1)))
def test_micro_batches_of_one_sample(step):
    """The least possible sum of maxima, and totals no further apart than samples within a micro-batch."""
    costs, ranks, _ = step
    per_micro_batch = micro_batch_costs(costs, balance(costs, ranks, 1), 1)
    assert per_micro_batch.max(0, initial=0).sum() == np.sort(costs)[::-1][::ranks].sum()
    assert np.ptp(per_micro_batch.sum(1)) <= max(np.ptp(per_micro_batch, axis=0), default=0)


@pytest.mark.parametrize("each_builder", ["C++"], indirect=True)
@given(step=steps(st.integers(1, 4)), scale=st.sampled_from([1.0, 0.1, 1e300]))
def test_builders_agree(step, scale):
    costs, ranks, micro = step
    with mock.patch.object(builder, "_native", None):
        expected = balance(costs * scale, ranks, micro).tolist()
    assert balance(costs * scale, ranks, micro).tolist() == expected


def test_ties_go_by_position_and_rank():
    assert balance(np.ones(6), 3, 1).tolist() == [[0, 3], [1, 4], [2, 5]]
    assert balance(np.array([1, 4, 2, 3]), 2, 1).tolist() == [[1, 0], [3, 2]]


def test_packed_documents_at_32k():
    """8 samples for each of 8 ranks: the slowest rank over the mean, in all and summed over micro-batches."""
    rng = np.random.default_rng(0)
    lengths = rng.lognormal(math.log(400), 1.5, 4000).astype(np.int64).clip(1, 32_768)
    items, starts = pack_best_fit(lengths, 32_768)
    costs = rng.permutation(np.add.reduceat(lengths[items] ** 2.0, starts[:-1]))[:64]
    in_order = micro_batch_costs(costs, np.arange(64).reshape(8, 8).T, 1)
    balanced = micro_batch_costs(costs, balance(costs, 8, 1), 1)
    slowest_before, slowest_after = (deal.sum(1).max() / costs.sum() * 8 for deal in (in_order, balanced))
    assert slowest_after < 1.1 < 1.5 < slowest_before
    waiting_before, waiting_after = (deal.max(0).sum() / costs.sum() * 8 for deal in (in_order, balanced))
    assert waiting_after < 1.4 < 2.5 < waiting_before


def test_samples_that_cannot_be_dealt_evenly():
    message = (
        r"10 samples .* 4 data-parallel ranks in micro-batches of 2; make train\.global_batch_size a multiple of 8"
    )
    with pytest.raises(ValueError, match=message):
        balance(np.ones(10), 4, 2)


@pytest.mark.parametrize("cost", [math.nan, math.inf])
def test_costs_are_finite(cost):
    with pytest.raises(ValueError, match=f"sample 1 costs {cost}; costs have to be finite"):
        balance(np.array([1.0, cost]), 2, 1)
