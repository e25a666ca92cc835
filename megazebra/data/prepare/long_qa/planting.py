"""Sentences put into a text near given places, between its lines or words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# A line break this near is worth a place a little off, in characters.
REACH = 120


@dataclass(frozen=True)
class Planted:
    """starts: where in `text` the sentences begin, in characters, in the order they were given."""

    text: str
    starts: list[int]


def plant(text: str, sentences: Sequence[str], places: Sequence[int]) -> Planted:
    """`text` with each sentence near its place, in characters of `text`; those with equal places in their order."""
    planted, copied = "", 0
    starts = [0] * len(sentences)
    for number in sorted(range(len(sentences)), key=lambda number: places[number]):
        stop = max(copied, _gap(text, places[number]))
        planted += text[copied:stop]
        if planted and not planted[-1].isspace():
            planted += "\n"
        starts[number] = len(planted)
        begins_line = planted.endswith("\n") or not planted
        planted += sentences[number] + ("\n" if begins_line or stop == len(text) else " ")
        copied = stop
    return Planted(planted + text[copied:], starts)


def trimmed(text: str) -> str:
    """`text` without its last word, which may be half of one."""
    end = max(text.rfind(" "), text.rfind("\n"))
    return text[: end + 1] if end >= 0 else text


def _gap(text: str, place: int) -> int:
    """The line break next to `place`, or the space before it, or just `place`, where none is near."""
    if place >= len(text):
        return len(text)
    before = text.rfind("\n", max(0, place - REACH), place) + 1
    after = text.find("\n", place, place + REACH) + 1
    near = [gap for gap in (before, after) if gap] + ([0] if place < REACH else [])
    if near:
        return min(near, key=lambda gap: abs(gap - place))
    return text.rfind(" ", max(0, place - REACH), place) + 1 or place
