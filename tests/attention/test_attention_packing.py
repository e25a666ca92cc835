import numpy as np
import pytest
import torch

from megazebra.attention import Packing
from megazebra.attention.reference import visible


def test_documents_of_two_rows():
    packing = Packing.from_document_lengths([[2, 1, 3], [6]])
    assert packing.document_start_BS.tolist() == [[0, 0, 2, 3, 3, 3], [0] * 6]
    assert packing.cu_seqlens_q.tolist() == packing.cu_seqlens_k.tolist() == [0, 2, 3, 6, 12]
    assert packing.cu_seqlens_q.dtype == packing.cu_seqlens_k.dtype == torch.int32
    assert (packing.max_seqlen_q, packing.max_seqlen_k, packing.keys_per_row) == (6, 6, 6)


def test_keys_that_reach_left_of_the_queries():
    # Three keys of halo: one of a document that ended there, two of the one that goes on.
    packing = Packing.from_spans([[0, 2, 2]], [[1, 4, 2]])
    assert packing.document_start_BS.tolist() == [[1, 1, 5, 5]]
    assert packing.cu_seqlens_q.tolist() == [0, 0, 2, 4]
    assert packing.cu_seqlens_k.tolist() == [0, 1, 5, 7]
    assert (packing.max_seqlen_q, packing.max_seqlen_k, packing.keys_per_row) == (2, 4, 7)


def test_matches_a_loop_over_tokens():
    random = np.random.default_rng(0)
    rows = [np.diff([0, *sorted(random.choice(np.arange(1, 500), 20, replace=False)), 500]).tolist() for _ in range(3)]
    packing = Packing.from_document_lengths(rows)
    expected = [[sum(row[:d]) for d, length in enumerate(row) for _ in range(length)] for row in rows]
    assert packing.document_start_BS.tolist() == expected


def test_to_moves_the_tensors_and_keeps_the_host_side():
    packing = Packing.from_document_lengths([[2, 1]])
    moved = packing.to("meta")
    assert {moved.document_start_BS.device.type, moved.cu_seqlens_q.device.type, moved.cu_seqlens_k.device.type} == {
        "meta"
    }
    assert moved.host_start_BS is packing.host_start_BS


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ([], "at least one row"),
        ([[]], "row 0"),
        ([[3, 0, 1]], r"row 0 .*shorter than one token: \[3, 0, 1\]"),
        ([[4], [5, -1]], "row 1 .*shorter than one token"),
        ([[3, 1], [3]], "row 1 of the packing has 3 queries and 3 keys, but row 0 has 4 and 4"),
    ],
)
def test_lengths_that_make_no_packing_are_refused(lengths, message):
    with pytest.raises(ValueError, match=message):
        Packing.from_document_lengths(lengths)


@pytest.mark.parametrize(
    ("queries", "keys"),
    [
        ([[2, 2]], [[3, 3]]),  # the second document has a key to the left of its first query, inside the first
        ([[2, 0]], [[2, 1]]),  # keys after the last query
        ([[0]], [[4]]),  # no query at all
        ([[3]], [[2]]),  # more queries than keys
    ],
)
def test_spans_that_do_not_end_together_are_refused(queries, keys):
    with pytest.raises(ValueError, match="end together"):
        Packing.from_spans(queries, keys)


def test_spans_of_different_counts_are_refused():
    with pytest.raises(ValueError, match="one query and one key length for each document"):
        Packing.from_spans([[1, 1]], [[2]])
    with pytest.raises(ValueError, match="1 of queries and 2 of keys"):
        Packing.from_spans([[1]], [[1], [1]])


@pytest.mark.parametrize(
    ("first_query", "end_query", "first_key"), [(0, 40, 0), (10, 20, 10), (10, 20, 3), (25, 40, 24), (39, 40, 0)]
)
def test_a_part_sees_what_the_whole_sees(first_query, end_query, first_key):
    whole = Packing.from_document_lengths([[4, 6, 1, 29], [12, 28], [40]])
    part = whole.part(first_query, end_query, first_key)
    S, T = end_query - first_query, end_query - first_key
    seen = visible(40, 40, 7, whole, torch.device("cpu"))[:, first_query:end_query, first_key:end_query]
    assert torch.equal(visible(S, T, 7, part, torch.device("cpu")).expand_as(seen), seen)


def test_a_part_inside_one_document_of_every_row_needs_no_packing():
    whole = Packing.from_document_lengths([[4, 6, 30], [12, 28]])
    assert whole.part(15, 40, 12) is None
    assert whole.part(15, 40, 11) is not None
