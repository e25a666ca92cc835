"""Models that need no training: one that copies what it has read, one that guesses, and the corpus they read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from megazebra.data.corpus.corpus_writer import CorpusWriter
from megazebra.data.corpus.indexed_corpus import Corpus
from megazebra.labels import IGNORE_INDEX


class _StandIn(nn.Module):
    """Predicts every label from the tokens up to its input; labels only say where that is asked for."""

    def forward(self, tokens_BS: Tensor, labels_BS: Tensor, positions_BS: Tensor, **how: Any) -> Tensor:
        assert how["reduction"] == "scores"
        hits_BS = torch.zeros(labels_BS.shape)
        for row, column in (labels_BS != IGNORE_INDEX).nonzero().tolist():
            before = tokens_BS[row, : column + 1].tolist()
            hits_BS[row, column] = float(self.predicted(before) == int(labels_BS[row, column]))
        return torch.stack([1 - hits_BS, hits_BS])

    def predicted(self, before: list[int]) -> int:
        raise NotImplementedError


class Copier(_StandIn):
    """Goes on as the text went on after the longest earlier occurrence of its end (an induction head).

    same: ids that it takes for each other.
    """

    def __init__(self, same: dict[int, int]) -> None:
        super().__init__()
        self.same = same

    def predicted(self, before: list[int]) -> int:
        read = [self.same.get(token, token) for token in before]
        best, following = 0, 0
        for end in range(1, len(read)):
            length = 0
            while length < end and read[end - 1 - length] == read[-1 - length]:
                length += 1
            if length >= best:
                best, following = length, before[end]
        return following


class Guesser(_StandIn):
    """Each of some ids with the same probability."""

    def __init__(self, ids: range) -> None:
        super().__init__()
        self.ids = ids
        self.random = np.random.default_rng(0)

    def predicted(self, before: list[int]) -> int:
        return int(self.random.choice(self.ids))


def random_corpus(prefix: Path, lengths: list[int], vocab_size: int) -> Corpus:
    random = np.random.default_rng(1)
    with CorpusWriter(prefix, vocab_size=vocab_size) as writer:
        for length in lengths:
            writer.add_document(random.integers(0, vocab_size, length))
    return Corpus(prefix)
