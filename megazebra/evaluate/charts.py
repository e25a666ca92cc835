"""Pictures of an evaluation: heat maps over length and depth, loss over position and over context."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megazebra.durable import write_atomically
from megazebra.evaluate.plan import TEXT_TASKS
from megazebra.evaluate.results import Row

COLORS = ("#1f3a5f", "#c8553d", "#3f7d5a", "#8a8577", "#8e44ad", "#d68910")
RULER_TITLE = "RULER-style tasks"


def draw_all(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Write the pictures there are rows for into the folder: TASK.png each, and ruler.png. Returns their paths."""
    drawn: dict[str, bytes] = {}
    for name in dict.fromkeys(row.task for row in rows):
        own = [row for row in rows if row.task == name]
        if name in TEXT_TASKS:
            drawn[name] = draw_positions(own) if name == "positions" else draw_contexts(own)
        elif own[0].depth is not None:
            drawn[name] = draw_depths(own, name)
    if ruler := [row for row in rows if row.task not in TEXT_TASKS and row.depth is None]:
        drawn["ruler"] = draw_ruler(ruler)
    paths = []
    for name, picture in drawn.items():
        paths.append(folder / f"{name}.png")
        write_atomically(paths[-1], picture)
    return paths


def draw_depths(rows: Sequence[Row], title: str) -> bytes:
    """A PNG: exact match of one task, a column for each length, a line for each depth."""
    lengths, depths = sorted({row.length for row in rows}), sorted({row.depth or 0.0 for row in rows})
    values = _grid(rows, [(depth, length) for depth in depths for length in lengths], lambda r: (r.depth, r.length))
    values = values.reshape(len(depths), len(lengths))
    return _heat_map(
        values,
        [_short(length) for length in lengths],
        [f"{depth:.0%}" for depth in depths],
        title=f"{title}: exact match of {rows[0].samples} samples",
        ylabel="depth of the answer in the text",
    )


def draw_ruler(rows: Sequence[Row]) -> bytes:
    """A PNG: exact match, a column for each length, a line for each task."""
    lengths, tasks = sorted({row.length for row in rows}), list(dict.fromkeys(row.task for row in rows))
    values = _grid(rows, [(task, length) for task in tasks for length in lengths], lambda r: (r.task, r.length))
    return _heat_map(
        values.reshape(len(tasks), len(lengths)),
        [_short(length) for length in lengths],
        [task.replace("_", " ") for task in tasks],
        title=f"{RULER_TITLE}: exact match of {rows[0].samples} samples",
        ylabel="",
    )


def draw_positions(rows: Sequence[Row]) -> bytes:
    """A PNG: loss over the position in the sequence, a line for each length."""
    figure, axes = _figure(7.5, 4.2)
    for number, length in enumerate(sorted({row.length for row in rows})):
        own = [row for row in rows if row.length == length and row.loss is not None]
        edges = [own[0].start, *(row.end for row in own)]
        axes.stairs(
            [row.loss for row in own], edges, baseline=None, linewidth=2,
            color=COLORS[number % len(COLORS)], label=f"sequences of {_short(length)}",
        )  # fmt: skip
    _over_tokens(axes, sorted({row.end for row in rows if row.end is not None}))
    axes.set_xlabel("position in the sequence (tokens)")
    axes.set_ylabel("loss (nats per token)")
    axes.set_title("Loss by position", fontsize=11)
    axes.legend(frameon=False)
    return _png(figure)


def draw_contexts(rows: Sequence[Row]) -> bytes:
    """A PNG: the loss of the same last tokens over the number of tokens before them."""
    figure, axes = _figure(7.5, 4.2)
    contexts = [(row.start or 0) + 1 for row in rows]
    points = sorted(zip(contexts, [np.nan if row.loss is None else row.loss for row in rows], strict=True))
    axes.plot(*zip(*points, strict=True), "o-", color=COLORS[0], linewidth=2)
    for context, loss in points:
        axes.annotate(
            f"{loss:.3f}", (context, loss), (0, 7), textcoords="offset points", ha="center", fontsize=8
        )  # fmt: skip
    _over_tokens(axes, sorted(contexts))
    final = rows[0].length - contexts[0]
    axes.margins(y=0.15)
    axes.set_xlabel("context before them (tokens)")
    axes.set_ylabel("loss (nats per token)")
    axes.set_title(f"The same last {final:,} tokens of {rows[0].samples} texts", fontsize=11)
    return _png(figure)


def _grid(rows: Sequence[Row], places: Sequence[Any], place_of: Callable[[Row], Any]) -> np.ndarray:
    """Exact match at every place, NaN where nothing was measured."""
    found = {place_of(row): row.exact_match for row in rows}
    return np.array([np.nan if found.get(place) is None else found[place] for place in places], dtype=np.float64)


def _heat_map(values: np.ndarray, columns: list[str], lines: list[str], *, title: str, ylabel: str) -> bytes:
    figure, axes = _figure(max(5.5, 2.2 + 0.85 * len(columns)), 1.5 + 0.4 * len(lines))
    axes.imshow(values, cmap="RdYlGn", vmin=0, vmax=1, aspect="auto", alpha=0.7)
    for (line, column), value in np.ndenumerate(values):
        text = "-" if np.isnan(value) else f"{value:.0%}"
        axes.text(column, line, text, ha="center", va="center", fontsize=9)
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(lines)), lines)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("length (tokens)")
    axes.set_ylabel(ylabel)
    axes.set_title(title, fontsize=11)
    return _png(figure)


def _over_tokens(axes: Any, ticks: list[int]) -> None:
    # Linear below the first tick: position 0 has a place.
    axes.set_xscale("symlog", base=2, linthresh=max(1, ticks[0]), linscale=0.5)
    step = -(-len(ticks) // 10)
    axes.set_xticks(ticks[::-1][::step], [_short(tick) for tick in ticks[::-1][::step]])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _figure(width: float, height: float) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(figsize=(width, height), layout="constrained")


def _png(figure: Any) -> bytes:
    from matplotlib import pyplot

    picture = io.BytesIO()
    figure.savefig(picture, dpi=130, format="png")
    pyplot.close(figure)
    return picture.getvalue()


def _short(tokens: int) -> str:
    for size, unit in ((2**20, "M"), (2**10, "k")):
        if tokens >= size and tokens % size == 0:
            return f"{tokens // size}{unit}"
    return f"{tokens:,}"
