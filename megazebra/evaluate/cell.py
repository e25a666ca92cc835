"""What is asked of a model, and what it scored: the contract between tasks, scoring and results. Imports no torch.

Everything is teacher-forced: the whole text, answers included, goes through the model once. Greedy decoding would
give exactly the gold answer if and only if every token of it is the likeliest one after those before it, so that
exact match needs no generation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from megazebra.evaluate.results import Row

NOT_ASKED = -1


@dataclass(frozen=True)
class Example:
    """One sequence and which of its tokens the model is to predict.

    tokens: int64 [n], n >= 2. bins: int64 [n], for every token the line of the Tally that its score is added to,
    NOT_ASKED where it is only read. The first token is never asked: nothing stands before it.
    """

    tokens: NDArray[np.int64]
    bins: NDArray[np.int64]

    def __post_init__(self) -> None:
        assert len(self.tokens) == len(self.bins) >= 2
        assert self.bins[0] == NOT_ASKED, "nothing predicts the first token"


class Tally(NamedTuple):
    """Sums over the tokens of each bin, float64 [bins].

    tokens: how many. loss: their cross-entropy in nats. hits: how many were the likeliest token.
    """

    tokens: NDArray[np.float64]
    loss: NDArray[np.float64]
    hits: NDArray[np.float64]


class Cell(Protocol):
    """Examples that are scored together and give rows of the results together.

    samples: how many examples. bins: how many bins they add to. length: tokens of the longest, at most.
    """

    @property
    def samples(self) -> int: ...

    @property
    def bins(self) -> int: ...

    @property
    def length(self) -> int: ...

    def example(self, index: int) -> Example:
        """A function of `index` alone, since every data-parallel rank makes its own ones."""
        ...

    def rows(self, tally: Tally) -> list[Row]: ...


def fraction(part: float, whole: float) -> float | None:
    """None where nothing was counted."""
    return float(part / whole) if whole else None


def asked(tokens: NDArray[np.int64], is_asked: NDArray[np.bool_], bin_: int) -> Example:
    """The example whose asked tokens all add to one bin."""
    return Example(tokens, np.where(is_asked, bin_, NOT_ASKED))
