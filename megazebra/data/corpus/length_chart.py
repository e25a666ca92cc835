"""A length histogram to look at: as lines of text, and as a PNG."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megazebra.data.corpus.statistics import LengthHistogram

BAR_WIDTH = 32
EIGHTHS = " ▏▎▍▌▋▊▉"
TOKENS_COLOR, DOCUMENTS_COLOR = "#1f3a5f", "#c8553d"
MOST_TICKS = 12


def chart_lines(histogram: LengthHistogram) -> list[str]:
    """A table with a line for each bucket from the first that is not empty on; bars show the share of tokens."""
    first = int((histogram.documents > 0).argmax())
    shares = histogram.tokens / histogram.tokens.sum()
    at_least = np.cumsum(histogram.tokens[::-1])[::-1] / histogram.tokens.sum()
    rows = [("length", "documents", "tokens", "share", "and longer", "")]
    for bucket in range(first, len(histogram.documents)):
        low, high = int(histogram.shortest[bucket]), int(histogram.longest[bucket])
        rows.append(
            (
                f"{low:,}" if low == high else f"{low:,} to {high:,}",
                f"{histogram.documents[bucket]:,}",
                f"{histogram.tokens[bucket]:,}",
                f"{shares[bucket]:.1%}",
                f"{at_least[bucket]:.1%}",
                _bar(shares[bucket] / shares.max()),
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join((*(f"{cell:>{width}}" for cell, width in zip(row[:-1], widths, strict=False)), row[-1])).rstrip()
        for row in rows
    ]


def draw_lengths(histogram: LengthHistogram, title: str) -> bytes:
    """A PNG: the share of tokens and of documents in each bucket, over length on a logarithmic axis."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    first = int((histogram.documents > 0).argmax())
    figure, (above, below) = pyplot.subplots(2, 1, figsize=(8, 5.4), layout="constrained", sharex=True)
    figure.suptitle(title)
    _draw_shares(above, histogram.tokens[first:], "tokens", TOKENS_COLOR)
    _draw_shares(below, histogram.documents[first:], "documents", DOCUMENTS_COLOR)
    starts = histogram.shortest[first:].tolist()
    step = -(-len(starts) // MOST_TICKS)
    # Bars lie between powers of two, so their edges are what has a name.
    below.set_xticks(np.arange(0, len(starts), step) - 0.5, [_short(start) for start in starts[::step]])
    below.set_xlabel("document length (tokens)")
    picture = io.BytesIO()
    figure.savefig(picture, dpi=130, format="png")
    pyplot.close(figure)
    return picture.getvalue()


def _draw_shares(axes: Any, counts: NDArray[np.int64], name: str, color: str) -> None:
    shares = counts / counts.sum()
    bars = axes.bar(np.arange(len(counts)), shares, width=0.92, color=color)
    axes.bar_label(bars, [_percent(share) for share in shares.tolist()], size=7)
    axes.yaxis.set_major_formatter("{x:.0%}")
    axes.set_ylabel(f"share of {name}")
    axes.margins(y=0.15)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _percent(share: float) -> str:
    return f"{share:.1%}" if share >= 0.001 else "<0.1%" if share else ""


def _bar(share: float) -> str:
    whole, eighths = divmod(round(share * BAR_WIDTH * 8), 8)
    return "█" * whole + EIGHTHS[eighths].strip()


def _short(length: int) -> str:
    for size, unit in ((2**30, "G"), (2**20, "M"), (2**10, "k")):
        if length >= size:
            return f"{length // size}{unit}"
    return str(length)
