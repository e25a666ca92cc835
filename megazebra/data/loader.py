"""Which rank takes which samples: the split of a step over data-parallel ranks and micro-batches.

Nothing here has a state: the caller keeps the number of samples consumed and may come back with another number
of ranks or another micro-batch size, and the steps' samples stay the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np

from megazebra.data.batch import MicroBatch, collate
from megazebra.data.index.balance import balance
from megazebra.data.samples import FiniteSource, Sample, SampleSource
from megazebra.labels import IGNORE_INDEX

Cost = Callable[[list[int]], float]


class StepLoader:
    """This rank's micro-batches of any step.

    Samples consumed to consumed + global_batch_size - 1 make a step; each rank takes an equal number of them, cut
    into micro-batches of micro_batch_size.

    cost: what the attention of a sample with these document lengths costs, in any unit. With it, samples are dealt
    to the ranks so that all have about the same to do in every micro-batch (they wait for each other there under
    ZeRO-3) and in the whole step; without it, each rank takes neighbours. Which samples make the step, and hence
    the gradient, is the same.

    Raises ValueError when the global batch does not divide into equal micro-batches.
    """

    def __init__(
        self,
        samples: SampleSource,
        *,
        global_batch_size: int,
        micro_batch_size: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        document_mask: bool = True,
        cost: Cost | None = None,
    ) -> None:
        _check_rank(dp_rank, dp_size)
        if global_batch_size % (micro_batch_size * dp_size):
            raise ValueError(
                f"train.global_batch_size={global_batch_size} is no multiple of train.micro_batch_size="
                f"{micro_batch_size} times {dp_size} data-parallel ranks; take a multiple of "
                f"{micro_batch_size * dp_size}"
            )
        self.samples = samples
        self.global_batch_size = global_batch_size
        self.micro_batch_size = micro_batch_size
        self.document_mask = document_mask
        self.dp_rank = dp_rank
        self.dp_size = dp_size
        self.cost = cost

    def next_step(self, consumed_samples: int) -> list[MicroBatch]:
        """The step after `consumed_samples` samples: global_batch_size / (micro_batch_size dp_size) micro-batches."""
        mine = self._share(consumed_samples)
        return [
            collate([self.samples[index] for index in indices], document_mask=self.document_mask)
            for indices in (mine[i : i + self.micro_batch_size] for i in range(0, len(mine), self.micro_batch_size))
        ]

    def _share(self, first: int) -> list[int]:
        """This rank's samples of the step that begins with sample `first`."""
        share = self.global_batch_size // self.dp_size
        if self.cost is None or self.dp_size == 1:
            start = first + self.dp_rank * share
            return list(range(start, start + share))
        costs = np.array(
            [self.cost(self.samples.document_lengths(index)) for index in range(first, first + self.global_batch_size)],
            dtype=np.float64,
        )
        places = balance(costs, self.dp_size, self.micro_batch_size)[self.dp_rank]
        return [first + place for place in places.tolist()]


def validation_batches(
    samples: FiniteSource,
    num_samples: int,
    *,
    micro_batch_size: int,
    dp_rank: int = 0,
    dp_size: int = 1,
    document_mask: bool = True,
) -> Iterator[MicroBatch]:
    """This rank's part of samples 0 to num_samples - 1, or of one epoch where that is less.

    The same samples whatever dp_size. Every rank gets the same number of micro-batches of the same shape, because
    forward passes contain collectives: rows without a sample repeat sample 0 with every label ignored.
    """
    _check_rank(dp_rank, dp_size)
    available = min(num_samples, samples.samples_per_epoch)
    for start in range(0, available, micro_batch_size * dp_size):
        first = start + dp_rank * micro_batch_size
        rows = [
            samples[index] if index < available else _filler(samples[0])
            for index in range(first, first + micro_batch_size)
        ]
        yield collate(rows, document_mask=document_mask)


def _filler(sample: Sample) -> Sample:
    return replace(sample, index=-1, labels=np.full_like(sample.labels, IGNORE_INDEX))


def _check_rank(dp_rank: int, dp_size: int) -> None:
    if not 0 <= dp_rank < dp_size:
        raise ValueError(f"dp_rank={dp_rank} is outside the {dp_size} data-parallel ranks")
