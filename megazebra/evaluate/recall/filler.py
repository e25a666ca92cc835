"""Text to hide an answer in: sentences of our own, or of a file; and made-up words."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megazebra.errors import UserError

_DETERMINERS = ("The", "Every", "Another", "One", "Some", "No")
_ADJECTIVES = ("quiet", "narrow", "green", "patient", "old", "hollow", "bright", "crooked", "salty", "early")
_NOUNS = (
    "river",
    "baker",
    "lantern",
    "orchard",
    "teacher",
    "bridge",
    "kettle",
    "sparrow",
    "harbour",
    "valley",
    "clock",
)
_VERBS = ("waits beside", "remembers", "passes", "leans against", "looks after", "follows", "belongs to", "covers")
_TIMES = ("in spring", "before noon", "as always", "after the rain", "once a week", "without a sound", "until evening")
_ONSETS = ("b", "d", "f", "g", "k", "l", "m", "n", "p", "r", "s", "t", "v", "z", "br", "dr", "gl", "pl", "st", "tr")
_RIMES = ("a", "e", "i", "o", "u", "an", "el", "in", "or", "um")


class Filler:
    """Sentences to draw from: random ones of a small vocabulary of ours, or the given ones, in their order."""

    def __init__(self, sentences: Sequence[str] | None = None) -> None:
        self._given = sentences

    @classmethod
    def from_file(cls, path: str | Path) -> Filler:
        """The sentences of a text file. Raises UserError when it holds none, OSError when it cannot be read."""
        text = Path(path).read_text(encoding="utf-8", errors="replace")
        sentences = [" ".join(part.split()) for part in re.split(r"(?<=[.!?])\s+|\n\s*\n", text)]
        if not any(sentences):
            raise UserError(f"{path} has no text to take filler from")
        return cls([sentence for sentence in sentences if sentence])

    def sentences(self, random: np.random.Generator, count: int) -> list[str]:
        """So many sentences; of given ones a run that begins anywhere and goes on at the beginning after the end.

        The first n are the same whatever `count`.
        """
        if self._given is not None:
            first = int(random.integers(len(self._given)))
            return [self._given[(first + i) % len(self._given)] for i in range(count)]
        words = (_DETERMINERS, _ADJECTIVES, _NOUNS, _VERBS, _ADJECTIVES, _NOUNS, _TIMES)
        picks = random.integers(0, [len(choices) for choices in words], (count, len(words))).tolist()
        drawn = ([choices[pick] for choices, pick in zip(words, row, strict=True)] for row in picks)
        return ["{} {} {} {} the {} {} {}.".format(*row) for row in drawn]


def made_up_words(random: np.random.Generator, count: int) -> list[str]:
    """Different words of two or three syllables that no language has, such as 'brumelta'."""
    words: dict[str, None] = {}
    while len(words) < count:
        syllables = random.integers(2, 4)
        onsets, rimes = random.integers(len(_ONSETS), size=syllables), random.integers(len(_RIMES), size=syllables)
        words["".join(_ONSETS[onset] + _RIMES[rime] for onset, rime in zip(onsets, rimes, strict=True))] = None
    return list(words)
