"""Positions and labels around document boundaries, against one token at a time."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megazebra.data.index.boundaries import document_positions, labels_and_positions
from megazebra.labels import IGNORE_INDEX

LENGTHS = st.lists(st.integers(1, 12), min_size=1, max_size=12)


@pytest.mark.usefixtures("each_builder")
@given(LENGTHS)
def test_positions_begin_anew_in_every_document(lengths: list[int]) -> None:
    positions = document_positions(lengths)
    assert positions.dtype == np.int64
    assert positions.tolist() == [position for length in lengths for position in range(length)]


@pytest.mark.usefixtures("each_builder")
@given(LENGTHS.filter(lambda lengths: sum(lengths) > 1))
def test_no_label_reaches_into_another_document(lengths: list[int]) -> None:
    document_of = [document for document, length in enumerate(lengths) for _ in range(length)]
    line = np.arange(100, 100 + len(document_of))
    expected = [
        token + 1 if here == after else IGNORE_INDEX
        for token, here, after in zip(line.tolist(), document_of, document_of[1:], strict=False)
    ]
    labels, positions = labels_and_positions(line, np.array(lengths))
    assert labels.dtype == positions.dtype == np.int64
    assert positions.tolist() == document_positions(lengths)[:-1].tolist()
    assert labels.tolist() == expected
    assert line.tolist() == list(range(100, 100 + len(document_of)))


@pytest.mark.usefixtures("each_builder")
def test_no_documents_have_no_positions() -> None:
    assert document_positions([]).tolist() == []
