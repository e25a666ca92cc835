"""Samples side by side, as the model takes them.

Shapes: B sequences of a micro-batch, S tokens of a sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from megazebra.data.samples import Sample
from megazebra.labels import IGNORE_INDEX


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass consumes.

    tokens_BS: int64. labels_BS: int64, the token after each input, IGNORE_INDEX where none counts.
    positions_BS: int64, 0 to S - 1, or from 0 in every document where documents are masked.
    document_lengths: per row the tokens of each document's piece, adding up to S; None without document mask.
    sample_indices: place of each row in the order; -1 for rows that only fill the batch.
    valid_tokens: labels that count, on this rank; counted on the host, so that no device is waited for.
    seq_len: tokens of a whole sequence, before it was padded or sliced.
    """

    tokens_BS: torch.Tensor
    labels_BS: torch.Tensor
    positions_BS: torch.Tensor
    document_lengths: list[list[int]] | None
    sample_indices: list[int]
    valid_tokens: int
    seq_len: int

    def padded(self, multiple: int) -> MicroBatch:
        """Sequences filled up to a multiple of tokens, with a document of padding of which nothing is learned."""
        missing = -self.tokens_BS.shape[1] % multiple
        if not missing:
            return self
        lengths = self.document_lengths
        return replace(
            self,
            tokens_BS=F.pad(self.tokens_BS, (0, missing)),
            labels_BS=F.pad(self.labels_BS, (0, missing), value=IGNORE_INDEX),
            positions_BS=F.pad(self.positions_BS, (0, missing)),
            # Without document mask the padding sees the sequence; nothing sees the padding, which comes last.
            document_lengths=None if lengths is None else [[*row, missing] for row in lengths],
        )

    def context_slice(self, rank: int, size: int) -> MicroBatch:
        """The contiguous part of every sequence that context-parallel rank `rank` of `size` holds: [B, S/size].

        document_lengths stay those of whole sequences, since documents may begin on another rank.
        Raises ValueError when S is not divisible by size: `padded` makes it so.
        """
        if size == 1:
            return self
        length = self.tokens_BS.shape[1]
        if length % size:
            raise ValueError(f"sequences of {length} tokens are not divisible by parallel.context={size}; pad them")
        part = slice(rank * length // size, (rank + 1) * length // size)
        labels_BS = self.labels_BS[:, part]
        return replace(
            self,
            tokens_BS=self.tokens_BS[:, part],
            labels_BS=labels_BS,
            positions_BS=self.positions_BS[:, part],
            valid_tokens=int((labels_BS != IGNORE_INDEX).sum()),
        )

    def to(self, device: torch.device | str) -> MicroBatch:
        """The same batch with its tensors on `device`."""
        return self._each_tensor(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> MicroBatch:
        """The same batch in page-locked memory: only from there is a copy to a GPU asynchronous."""
        return self._each_tensor(lambda tensor: tensor.contiguous().pin_memory())

    def _each_tensor(self, change: Callable[[torch.Tensor], torch.Tensor]) -> MicroBatch:
        return replace(
            self,
            tokens_BS=change(self.tokens_BS),
            labels_BS=change(self.labels_BS),
            positions_BS=change(self.positions_BS),
        )


def collate(samples: Sequence[Sample], *, document_mask: bool) -> MicroBatch:
    """Samples of one length as a MicroBatch of CPU tensors; without document_mask it forgets their documents."""
    labels = _rows([sample.labels for sample in samples])
    return MicroBatch(
        torch.from_numpy(_rows([sample.tokens for sample in samples])),
        torch.from_numpy(labels),
        torch.from_numpy(_rows([sample.positions for sample in samples])),
        [sample.document_lengths for sample in samples] if document_mask else None,
        [sample.index for sample in samples],
        int(np.count_nonzero(labels != IGNORE_INDEX)),
        labels.shape[1],
    )


def _rows(rows: list[NDArray[np.int64]]) -> NDArray[np.int64]:
    """[B, S]; a long single row is not copied."""
    return rows[0][None] if len(rows) == 1 else np.stack(rows)
