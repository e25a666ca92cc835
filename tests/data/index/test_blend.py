"""Blending: within the proven bound for any weights and any number of samples, and never dependent on the past."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megazebra.data.index.blend import MAX_SAMPLES, WEIGHT_UNITS, Blend

pytestmark = pytest.mark.usefixtures("each_builder")

any_weights = st.lists(
    st.floats(min_value=0, exclude_min=True, allow_infinity=False) | st.floats(0.5, 2) | st.just(1.0),
    min_size=1,
    max_size=24,
)


@given(weights=any_weights, n=st.integers(0, MAX_SAMPLES) | st.integers(0, 500))
def test_counts_are_less_than_two_from_the_shares(weights, n):
    blend = Blend(weights)
    counts = blend.counts(n).tolist()
    assert sum(counts) == n
    total = sum(blend.numerators)
    for count, numerator in zip(counts, blend.numerators, strict=True):
        assert abs(count - n * Fraction(numerator, total)) < 2


@given(weights=any_weights)
def test_shares_are_the_weights(weights):
    """To one unit for the weight's own rounding, and one per source for that of the sum."""
    numerators = Blend(weights).numerators
    exact = [Fraction(weight) for weight in weights]
    for numerator, weight in zip(numerators, exact, strict=True):
        error = Fraction(numerator, sum(numerators)) - weight / sum(exact)
        assert abs(error) <= Fraction(1 + len(weights), WEIGHT_UNITS)


@settings(deadline=None)
@given(weights=any_weights, count=st.integers(0, 60))
def test_sources_give_their_samples_in_turn(weights, count):
    blend = Blend(weights)
    sources, indices = blend.locate(0, count)
    assert sources.dtype == indices.dtype == np.int64
    given_so_far = [0] * len(weights)
    for n, (source, index) in enumerate(zip(sources.tolist(), indices.tolist(), strict=True)):
        assert blend.counts(n).tolist() == given_so_far
        assert index == given_so_far[source]
        given_so_far[source] += 1


@settings(deadline=None)
@given(weights=any_weights, first=st.integers(0, MAX_SAMPLES - 50), counts=st.lists(st.integers(0, 10), max_size=5))
def test_samples_do_not_depend_on_the_steps_they_are_located_in(weights, first, counts):
    blend = Blend(weights)
    whole = blend.locate(first, sum(counts))
    steps = [blend.locate(first + sum(counts[:i]), count) for i, count in enumerate(counts)]
    for part, column in enumerate(whole):
        assert column.tolist() == [value for step in steps for value in step[part].tolist()]
    # What lies between two counts is what these samples are.
    gained = blend.counts(first + sum(counts)) - blend.counts(first)
    assert gained.tolist() == np.bincount(whole[0], minlength=len(weights)).tolist()


def test_simple_blends():
    assert Blend([7]).locate(5, 3)[1].tolist() == [5, 6, 7]
    assert Blend([1, 1]).locate(0, 6)[0].tolist() in ([0, 1] * 3, [1, 0] * 3)
    sources, _ = Blend([0.6, 0.2, 0.2]).locate(0, 500)
    assert np.bincount(sources).tolist() == [300, 100, 100]
    assert sources[0] == 0


def test_rare_sources_come_when_due():
    blend = Blend([1e-6, 1.0, 3e-6, 1e-300])
    assert (blend.locate(0, 10_000)[0] == 1).all()
    assert blend.counts(200_000).tolist() == [0, 199_999, 1, 0]
    n = 10**12
    counts = blend.counts(n)
    assert np.abs(counts[[0, 2]] - n * np.array([1e-6, 3e-6]) / (1 + 4e-6)).max() < 2
    assert counts[3] == 0


def test_many_sources_stay_within_two():
    weights = np.random.default_rng(0).pareto(0.5, 1000) + 1e-3
    blend = Blend(weights)
    shares = np.array(blend.numerators) / sum(blend.numerators)
    for n in (1, 999, 10_000, 123_456_789):
        assert np.abs(blend.counts(n) - n * shares).max() < 2


def test_golden_order():
    """The order is a promise to every run under way: it may not differ between builders, platforms or versions."""
    blend = Blend([5, 3, 2, 1])
    assert blend.locate(0, 22)[0].tolist() == [1, 0, 2, 0, 1, 0, 3, 0, 1, 0, 2, 1, 0, 2, 0, 1, 0, 3, 0, 1, 0, 2]
    sources, indices = blend.locate(2**62 - 3, 3)
    assert sources.tolist() == [2, 0, 1]
    assert indices.tolist() == [838488366986797799, 2096220917466994501, 1257732550480196701]


@pytest.mark.parametrize("weight", [0, -1.0, math.nan, math.inf])
def test_weights_are_positive_and_finite(weight):
    with pytest.raises(ValueError, match=f"weight 1 of the blend is {weight}; weights are positive and finite"):
        Blend([1.0, weight, 2.0])


def test_at_least_one_source():
    with pytest.raises(ValueError, match="a blend needs at least one source"):
        Blend([])


def test_samples_beyond_the_last():
    blend = Blend([1, 2])
    assert len(blend.locate(MAX_SAMPLES, 0)[0]) == 0
    for first, count in ((-1, 1), (MAX_SAMPLES, 1), (0, -1)):
        with pytest.raises(IndexError, match="of a blend"):
            blend.locate(first, count)
    with pytest.raises(IndexError, match="of a blend"):
        blend.counts(MAX_SAMPLES + 1)
