"""From an index to tokens: a sample source is anything that gives sample i."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from megazebra.data.corpus.indexed_corpus import Corpus
from megazebra.data.index.order import SampleOrder


@dataclass(frozen=True)
class Sample:
    """One training sequence of L inputs.

    tokens: int64 [L + 1]; inputs are all but the last, labels all but the first.
    segment_lengths: tokens of each document's piece in turn, over the L + 1 tokens.
    index: its place in the order; -1 for one that only fills a batch.
    label_mask: bool [L], False where a label does not count; None: all count.
    """

    tokens: NDArray[np.int64]
    segment_lengths: list[int]
    index: int
    label_mask: NDArray[np.bool_] | None = None

    @property
    def document_lengths(self) -> list[int]:
        """Tokens of each document's piece over the L inputs."""
        *whole, last = self.segment_lengths
        return [*whole, last - 1] if last > 1 else whole


class SampleSource(Protocol):
    """What a loader draws from. Sample i has to be a function of i alone."""

    @property
    def samples_per_epoch(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...


class CorpusSamples:
    """A corpus as samples of seq_len + 1 tokens, concatenated and chunked in the default order.

    shuffle: False for validation, which takes the first samples of the natural order.

    Raises CorpusError when the corpus is smaller than one sample.
    """

    def __init__(self, corpus: Corpus, seq_len: int, seed: int = 0, *, shuffle: bool = True) -> None:
        self.corpus = corpus
        self.order = SampleOrder(
            corpus.document_lengths, seq_len, seed, corpus.fingerprint, shuffle=shuffle, source=repr(corpus.prefix)
        )

    @property
    def samples_per_epoch(self) -> int:
        return self.order.samples_per_epoch

    def __getitem__(self, index: int) -> Sample:
        spans = self.order.locate(index)
        tokens = np.concatenate([self.corpus.read(*span) for span in spans])
        return Sample(tokens, [span.length for span in spans], index)
