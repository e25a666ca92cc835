"""Samples of one task at one length and depth, as a cell. Imports no torch."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megazebra.evaluate.cell import Example, Tally, asked, fraction
from megazebra.evaluate.results import Row


@dataclass(frozen=True)
class Question:
    """A text with its question and answer. tokens: int64 [n]. is_answer: bool [n]."""

    tokens: NDArray[np.int64]
    is_answer: NDArray[np.bool_]


# `task(random, length, depth)`: a question of at most `length` tokens whose answer stands at that depth, 0 to 1, of
# the text; tasks that have several places draw them and ignore the depth. All randomness is of `random`.
Task = Callable[[np.random.Generator, int, float], Question]


def generator(task: str, seed: int, index: int, length: int, depth: float | None) -> np.random.Generator:
    """The randomness of one sample: a function of its place in the experiment and nothing else."""
    place = 0 if depth is None else 1 + round(depth * 10_000)
    return np.random.default_rng([zlib.crc32(task.encode()), seed, index, length, place])


@dataclass(frozen=True)
class AnswerCell:
    """`samples` questions of a task; every one has a bin of its own, so that exact matches can be told.

    depth: None where the task has none, or draws one for each sample.
    """

    name: str
    task: Task
    samples: int
    length: int
    depth: float | None
    seed: int

    @property
    def bins(self) -> int:
        return self.samples

    def question(self, index: int) -> Question:
        """A function of the task, seed, index, length and depth."""
        random = generator(self.name, self.seed, index, self.length, self.depth)
        return self.task(random, self.length, random.random() if self.depth is None else self.depth)

    def example(self, index: int) -> Example:
        question = self.question(index)
        return asked(question.tokens, question.is_answer, index)

    def rows(self, tally: Tally) -> list[Row]:
        tokens = float(tally.tokens.sum())
        return [
            Row(
                task=self.name,
                length=self.length,
                depth=self.depth,
                samples=self.samples,
                tokens=int(tokens),
                loss=fraction(float(tally.loss.sum()), tokens),
                token_accuracy=fraction(float(tally.hits.sum()), tokens),
                exact_match=float(np.mean(tally.hits == tally.tokens)),
            )
        ]
