"""Which rank takes which samples: the split of a step over data-parallel ranks and micro-batches.

Nothing here has a state: the caller keeps the number of samples consumed and may come back with another number
of ranks or another micro-batch size, and the steps' samples stay the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from megazebra.data.batch import MicroBatch, collate
from megazebra.data.samples import Sample, SampleSource


class StepLoader:
    """This rank's micro-batches of any step.

    Samples consumed to consumed + global_batch_size - 1 make a step; each rank takes an equal share of
    neighbours, cut into micro-batches of micro_batch_size.

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
        self._share = global_batch_size // dp_size
        self._offset = dp_rank * self._share

    def next_step(self, consumed_samples: int) -> list[MicroBatch]:
        """The step after `consumed_samples` samples: global_batch_size / (micro_batch_size dp_size) micro-batches."""
        first = consumed_samples + self._offset
        return [
            collate(
                [self.samples[index] for index in range(start, start + self.micro_batch_size)],
                document_mask=self.document_mask,
            )
            for start in range(first, first + self._share, self.micro_batch_size)
        ]


def validation_batches(
    samples: SampleSource,
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
            samples[index] if index < available else _filler(samples)
            for index in range(first, first + micro_batch_size)
        ]
        yield collate(rows, document_mask=document_mask)


def _filler(samples: SampleSource) -> Sample:
    sample = samples[0]
    return replace(sample, index=-1, label_mask=np.zeros(len(sample.tokens) - 1, dtype=np.bool_))


def _check_rank(dp_rank: int, dp_size: int) -> None:
    if not 0 <= dp_rank < dp_size:
        raise ValueError(f"dp_rank={dp_rank} is outside the {dp_size} data-parallel ranks")
