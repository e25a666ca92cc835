"""Keyed permutations: bijections, the same from both builders, pinned by golden values, without structure."""

from __future__ import annotations

from collections import Counter
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megazebra.data.index import builder
from megazebra.data.index.permutation import KeyedPermutation, derive_key

NATIVE = builder.native()
GOLDEN_KEY = 9447275210887921784
GOLDEN_TEN = [2, 7, 5, 1, 0, 9, 6, 3, 4, 8]
GOLDEN_LARGE = [11780540017, 813297149833, 49859373615]

parts = st.lists(st.integers() | st.text(), min_size=1, max_size=3)


@settings(deadline=None)
@given(size=st.integers(1, 3000), key=parts)
@pytest.mark.usefixtures("each_builder")
def test_is_a_bijection(size, key):
    permuted = KeyedPermutation(size, *key).all()
    assert permuted.dtype == np.int64
    assert sorted(permuted.tolist()) == list(range(size))


@settings(deadline=None)
@given(size=st.integers(1, 2**63), key=parts, data=st.data())
@pytest.mark.usefixtures("each_builder")
def test_images_of_large_sizes_are_distinct(size, key, data):
    values = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=8, unique=True))
    images = {KeyedPermutation(size, *key)(value) for value in values}
    assert len(images) == len(values)
    assert all(0 <= image < size for image in images)


@pytest.mark.skipif(NATIVE is None, reason=builder.describe())
@settings(deadline=None)
@given(size=st.integers(1, 2**63), key=parts, data=st.data())
def test_builders_agree(size, key, data):
    value = data.draw(st.integers(0, size - 1))
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(builder, "_native", None)
        permutation = KeyedPermutation(size, *key)
        assert permutation(value) == NATIVE.permute(size, permutation.key, value)


@pytest.mark.usefixtures("each_builder")
@pytest.mark.parametrize("size", [1, 2, 3, 63, 64, 65, 1000, 1024, 19_532])
def test_all_are_the_images_of_each(size):
    permutation = KeyedPermutation(size, "key", 3)
    images = permutation.all().tolist()
    for value in {0, 1, size // 2, size - 1} & set(range(size)):
        assert images[value] == permutation(value)


@pytest.mark.usefixtures("each_builder")
def test_golden_values():
    """The order is a promise to every run under way: it may not differ between builders, platforms or versions."""
    assert derive_key("key", 1) == GOLDEN_KEY
    assert KeyedPermutation(10, "key", 1).all().tolist() == GOLDEN_TEN
    assert [KeyedPermutation(10**12, "key", 2)(i) for i in (0, 1, 10**12 - 1)] == GOLDEN_LARGE


def test_keys_are_told_apart():
    parts = [(), (0,), (1,), (0, 0), (0, 1), (1, 0), ("",), ("0",), ("0", 0), ("a", "b"), ("ab",), (-1,), (2**63,)]
    assert len({derive_key(*part) for part in parts}) == len(parts)


def chi_square(counts: np.ndarray) -> float:
    """Standard deviations by which Pearson's statistic of equally likely outcomes exceeds its mean."""
    expected, freedom = counts.sum() / len(counts), len(counts) - 1
    statistic = ((counts - expected) ** 2 / expected).sum()
    return float((statistic - freedom) / np.sqrt(2 * freedom))


def test_small_sizes_reach_every_permutation_equally():
    for size in (2, 3, 4):
        seen = Counter(tuple(KeyedPermutation(size, "small", key).all().tolist()) for key in range(2000))
        assert chi_square(np.array([seen[each] for each in permutations(range(size))])) < 3.5


@pytest.mark.parametrize("size", [16, 100, 1024])
def test_values_land_anywhere(size):
    """Over many keys: where a value lands, and how far apart neighbours do, is uniform."""
    images = np.stack([KeyedPermutation(size, "spread", key).all() for key in range(2000)])
    for value in (0, 1, size // 2, size - 1):
        assert chi_square(np.bincount(images[:, value], minlength=size)) < 3.5
        distances = (images[:, value] - images[:, value - 1]) % size
        assert chi_square(np.bincount(distances, minlength=size)[1:]) < 3.5
    fixed_points = (images == np.arange(size)).sum(axis=1)
    assert abs(fixed_points.mean() - 1) < 0.1


def test_one_permutation_has_no_structure():
    """Neighbours scatter: about one in n keeps its successor, and positions don't correlate."""
    n = 4096
    permuted = KeyedPermutation(n, "any").all()
    assert (np.diff(permuted) == 1).sum() < 8
    assert abs(np.corrcoef(np.arange(n), permuted)[0, 1]) < 0.06
