"""The chart of tools/bench_attention.py: what a token costs in a layer, over the length of the sequence."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

from megazebra.durable import write_atomically

# By side, ours first: color, marker, and where the label stands from the line's end (points, below or above).
STYLES = (("#c8553d", "o", (0, -16)), ("#1f3a5f", "s", (-12, -3)), ("#8a8577", "^", (0, 9)))


def draw_cost(panels: Mapping[str, Mapping[str, Mapping[int, float]]], title: str, target: Path) -> None:
    """panels: by title, for every side the seconds per token and head of forward and backward at every length."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    figure, row = pyplot.subplots(
        1, len(panels), figsize=(4.6 * len(panels), 4.4), layout="constrained", squeeze=False, sharey=True
    )
    for axes, (panel, sides) in zip(row[0], panels.items(), strict=True):
        for (side, points), (color, marker, away) in zip(sides.items(), STYLES, strict=True):
            lengths = sorted(points)
            cost = [points[S] * 1e6 for S in lengths]
            axes.plot(lengths, cost, marker=marker, color=color, linewidth=2, markersize=5)
            end = (lengths[-1], cost[-1])
            axes.annotate(side, end, away, textcoords="offset points", color=color, ha="right", fontsize=9)
        ticks = sorted({S for points in sides.values() for S in points})
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(ticks, [f"{S // 1024}k" for S in ticks])
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
        axes.minorticks_off()
        axes.margins(y=0.12)
        axes.set_title(panel, fontsize=10)
        axes.set_xlabel("tokens in the sequence")
        axes.grid(alpha=0.3)
    row[0][0].set_ylabel("µs per token and head, forward + backward")
    figure.suptitle(title, fontsize=11)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=130, format="png")
    pyplot.close(figure)
    write_atomically(target, picture.getvalue())
