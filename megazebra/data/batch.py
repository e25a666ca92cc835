"""Samples side by side, as the model takes them.

Shapes: B sequences of a micro-batch, S tokens of a sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

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
    """

    tokens_BS: torch.Tensor
    labels_BS: torch.Tensor
    positions_BS: torch.Tensor
    document_lengths: list[list[int]] | None
    sample_indices: list[int]
    valid_tokens: int

    def context_slice(self, rank: int, size: int) -> MicroBatch:
        """The contiguous part of every sequence that context-parallel rank `rank` of `size` holds: [B, S/size].

        document_lengths stay those of whole sequences, since documents may begin on another rank.
        Raises ValueError when S is not divisible by size.
        """
        if size == 1:
            return self
        length = self.tokens_BS.shape[1]
        if length % size:
            raise ValueError(f"data.seq_len={length} is not divisible by parallel.context={size}; take a multiple")
        part = slice(rank * length // size, (rank + 1) * length // size)
        labels_BS = self.labels_BS[:, part]
        return replace(
            self,
            tokens_BS=self.tokens_BS[:, part],
            labels_BS=labels_BS,
            positions_BS=self.positions_BS[:, part],
            valid_tokens=_count(labels_BS),
        )

    def to(self, device: torch.device | str) -> MicroBatch:
        """The same batch with its tensors on `device`; copies to a GPU do not wait for it."""
        device = torch.device(device)

        def move(tensor: torch.Tensor) -> torch.Tensor:
            # Only from pinned memory is a copy asynchronous.
            pinned = tensor.contiguous().pin_memory() if device.type == "cuda" else tensor
            return pinned.to(device, non_blocking=True)

        return replace(
            self,
            tokens_BS=move(self.tokens_BS),
            labels_BS=move(self.labels_BS),
            positions_BS=move(self.positions_BS),
        )


def collate(samples: Sequence[Sample], *, document_mask: bool) -> MicroBatch:
    """Samples of one length as a MicroBatch of CPU tensors.

    With document_mask, positions restart at every document, and a document's last token has no label: what
    follows is another document's first token, which it cannot know. Without, both run through.
    """
    rows = np.stack([sample.tokens for sample in samples])
    tokens, labels = rows[:, :-1].copy(), rows[:, 1:].copy()
    positions = np.tile(np.arange(tokens.shape[1], dtype=np.int64), (len(samples), 1))
    for row, sample in enumerate(samples):
        if document_mask:
            lengths = sample.document_lengths
            starts = np.cumsum(lengths) - lengths
            positions[row] -= np.repeat(starts, lengths)
            labels[row, np.cumsum(sample.segment_lengths[:-1], dtype=np.int64) - 1] = IGNORE_INDEX
        if sample.label_mask is not None:
            labels[row, ~sample.label_mask] = IGNORE_INDEX
    labels_BS = torch.from_numpy(labels)
    return MicroBatch(
        torch.from_numpy(tokens),
        labels_BS,
        torch.from_numpy(positions),
        [sample.document_lengths for sample in samples] if document_mask else None,
        [sample.index for sample in samples],
        _count(labels_BS),
    )


def _count(labels_BS: torch.Tensor) -> int:
    return int((labels_BS != IGNORE_INDEX).sum())
