"""Length histograms and what is drawn of them, against counting one by one."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from matplotlib import image

from megazebra.data.corpus import statistics
from megazebra.data.corpus.length_chart import chart_lines, draw_lengths
from megazebra.data.corpus.statistics import length_histogram, length_percentiles
from megazebra.data.index import builder


@pytest.mark.parametrize("compiled", [True, False])
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lengths=st.lists(st.integers(0, 40) | st.integers(0, 2**40), min_size=1, max_size=30).filter(any))
def test_histogram_counts_every_document_once(monkeypatch, compiled, lengths):
    if not compiled:
        monkeypatch.setattr(builder, "_native", None)
    monkeypatch.setattr(statistics, "PIECE", 7)
    histogram = length_histogram(np.array(lengths))
    assert histogram.longest[-1] >= max(lengths)
    for low, high, documents, tokens in zip(
        histogram.shortest, histogram.longest, histogram.documents, histogram.tokens, strict=True
    ):
        inside = [length for length in lengths if low <= length <= high]
        assert (documents, tokens) == (len(inside), sum(inside))
    assert histogram.documents.sum() == len(lengths)
    assert histogram.documents[-1] > 0


def test_buckets_are_powers_of_two():
    histogram = length_histogram(np.array([9], dtype=np.int32))
    assert list(zip(histogram.shortest.tolist(), histogram.longest.tolist(), strict=True)) == [
        (0, 0),
        (1, 1),
        (2, 3),
        (4, 7),
        (8, 15),
    ]


def test_longest_possible_lengths():
    """Sums that 32 bits don't hold, and lengths that floats don't tell apart."""
    lengths = np.array([2**62 - 1, 2**62, 5])
    histogram = length_histogram(lengths)
    assert histogram.tokens[-2:].tolist() == [2**62 - 1, 2**62]
    assert length_percentiles(lengths)[99] == 2**62


def test_percentiles_are_lengths_that_occur():
    assert length_percentiles(np.arange(1, 101)) == {share: share for share in (1, 10, 25, 50, 75, 90, 99)}


def test_lines_show_counts_and_bars():
    lines = chart_lines(length_histogram(np.array([1000, 1000, 600, 5, 5, 0])))
    assert lines[0].split() == ["length", "documents", "tokens", "share", "and", "longer"]
    assert [line.split()[0] for line in lines[1:4]] == ["0", "1", "2"]
    assert lines[-1].split()[:7] == ["512", "to", "1,023", "3", "2,600", "99.6%", "99.6%"]
    assert lines[-1].endswith("█" * 32)
    assert lines[1].split()[1:] == ["1", "0", "0.0%", "100.0%"]
    assert all("█" not in line for line in lines[:-1])


def test_lines_begin_with_the_shortest_documents():
    lines = chart_lines(length_histogram(np.array([4000, 2000])))
    assert [line.split()[0] for line in lines] == ["length", "1,024", "2,048"]


def test_picture_is_taller_where_more_tokens_are():
    """Dark blue pixels in the upper half: the bar of the many tokens against that of the few."""
    picture = image.imread(io.BytesIO(draw_lengths(length_histogram(np.array([40, 100])), "a corpus")))
    rows, columns = np.nonzero((np.abs(picture[..., :3] - np.array([0x1F, 0x3A, 0x5F]) / 255) < 0.01).all(-1))
    assert rows.max() < picture.shape[0] / 2
    heights = np.bincount(columns, minlength=picture.shape[1])
    left, right = heights[: len(heights) // 2].max(), heights[len(heights) // 2 :].max()
    assert right / left == pytest.approx(100 / 40, rel=0.05)
