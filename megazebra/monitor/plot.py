"""Curves in characters: a chart of braille dots, and a line of blocks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

_DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))  # bits of U+2800 by column and row of a character
_BLOCKS = "▁▂▃▄▅▆▇█"


def braille(points: Iterable[tuple[float, float]], width: int, height: int) -> tuple[list[str], float, float]:
    """The points, in order of x, as `height` lines of `width` characters; then the values at the bottom and the top.

    A column of dots shows everything from its lowest to its highest value, so that a spike of one step is to be seen.
    Raises ValueError where there are no points.
    """
    points = list(points)
    if not points:
        raise ValueError("there are no points to draw")
    columns, rows = 2 * width, 4 * height
    first, last = points[0][0], points[-1][0]
    lowest, highest = min(y for _, y in points), max(y for _, y in points)
    cells = [[0] * width for _ in range(height)]
    before: tuple[int, int] | None = None
    for column, (low, high) in enumerate(_extents(points, first, last, columns)):
        bottom, top = extent = _place(low, lowest, highest, rows), _place(high, lowest, highest, rows)
        if before is not None:  # a steep curve stays one line
            bottom, top = min(bottom, before[1] + 1), max(top, before[0] - 1)
        for row in range(bottom, top + 1):
            from_top = rows - 1 - row
            cells[from_top // 4][column // 2] |= _DOTS[column % 2][from_top % 4]
        before = extent
    return ["".join(chr(0x2800 + cell) for cell in line) for line in cells], lowest, highest


def blocks(values: Sequence[float], width: int) -> str:
    """The last `width` values, one character each, between the lowest and the highest of them."""
    shown = values[-width:] if width > 0 else []
    if not shown:
        return ""
    return "".join(_BLOCKS[_place(value, min(shown), max(shown), len(_BLOCKS))] for value in shown)


def _extents(
    points: Sequence[tuple[float, float]], first: float, last: float, columns: int
) -> list[tuple[float, float]]:
    """Lowest and highest value of every column, on the straight line between its neighbours where it has none."""
    found: dict[int, tuple[float, float]] = {}
    for x, y in points:
        column = _place(x, first, last, columns)
        low, high = found.get(column, (y, y))
        found[column] = min(low, y), max(high, y)
    known = sorted(found)
    middles = {column: sum(found[column]) / 2 for column in known}
    for left, right in pairwise(known):
        for column in range(left + 1, right):
            share = (column - left) / (right - left)
            found[column] = (middles[left] + share * (middles[right] - middles[left]),) * 2
    ends = dict.fromkeys(range(known[0]), found[known[0]]) | dict.fromkeys(
        range(known[-1] + 1, columns), found[known[-1]]
    )  # a single point is a level line
    return [(found | ends)[column] for column in range(columns)]


def _place(value: float, lowest: float, highest: float, places: int) -> int:
    """Which of equally wide places the value is in; the middle one where all values are the same."""
    if highest <= lowest:
        return places // 2
    return min(places - 1, max(0, int((value - lowest) / (highest - lowest) * places)))
