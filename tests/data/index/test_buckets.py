"""Buckets by length: each document in the one its length belongs to, in order."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megazebra.data.index.buckets import bucket_by_length

pytestmark = pytest.mark.usefixtures("each_builder")


def buckets(lengths, bounds):
    documents, starts = bucket_by_length(lengths, bounds)
    assert documents.dtype == starts.dtype == np.int64
    return [documents[start:end].tolist() for start, end in itertools.pairwise(starts)]


@given(
    lengths=st.lists(st.integers(0, 100), max_size=60),
    bounds=st.lists(st.integers(0, 100), unique=True, max_size=6).map(sorted),
    dtype=st.sampled_from([np.uint8, np.int32, np.int64]),
)
def test_buckets_are_the_documents_between_their_bounds(lengths, bounds, dtype):
    edges = [0, *bounds, 101]
    expected = [
        [document for document, length in enumerate(lengths) if low <= length < high]
        for low, high in itertools.pairwise(edges)
    ]
    assert buckets(np.array(lengths, dtype=dtype), bounds) == expected


def test_lengths_beyond_32_bits():
    lengths = np.array([2**40, 2**31 - 1, 2**31, 5])
    assert buckets(lengths, [2**31, 2**40]) == [[1, 3], [2], [0]]


@pytest.mark.parametrize("bounds", [[4, 2], [4, 4]])
def test_bounds_have_to_increase(bounds):
    with pytest.raises(ValueError, match=r"bounds of lengths have to increase, got \[4, [24]\]"):
        bucket_by_length(np.array([1, 2]), bounds)
