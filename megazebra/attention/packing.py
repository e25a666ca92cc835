"""Where the documents lie in the rows of a batch.

Shapes: B rows of the batch, S queries of a row, n documents of all rows together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

Lengths = Sequence[int] | np.ndarray


@dataclass(frozen=True, eq=False)  # compared and hashed by identity, so that masks can be cached on it
class Packing:
    """Documents packed in the rows of a batch: a query sees keys of its own document only.

    document_start_BS: int64 [B, S], index in the row's keys of the first key of each query's document.
    cu_seqlens_q, cu_seqlens_k: int32 [n + 1], boundaries of the documents in the flattened rows (each row's
        end is one), in queries and in keys.
    max_seqlen_q, max_seqlen_k: the longest document, counted on the host so that no kernel launch waits.
    keys_per_row: T; more than S when the keys reach further left than the queries.
    host_start_BS: document_start_BS as a numpy array, for loops that are laid out on the host.
    derived: what others have made of this packing, kept for as long as it lives.

    A backend that gets None in place of a Packing takes every row as one document.
    """

    document_start_BS: Tensor
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    keys_per_row: int
    host_start_BS: np.ndarray
    derived: dict[Any, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def from_document_lengths(cls, lengths: Sequence[Lengths], device: torch.device | str = "cpu") -> Packing:
        """Rows made of whole documents: one list of lengths for each row, every row with the same sum S.

        Raises ValueError when there is no row, a document is shorter than one token, or the sums differ.
        """
        return cls.from_spans(lengths, lengths, device)

    @classmethod
    def from_spans(
        cls,
        query_lengths: Sequence[Lengths],
        key_lengths: Sequence[Lengths],
        device: torch.device | str = "cpu",
    ) -> Packing:
        """Rows whose keys reach further left than their queries, as a rank of context parallelism sees them.

        Each row gives, for every document that has keys in it, its number of queries and of keys. Only the
        documents up to the one with the first query can have more keys than queries; those before it have none.

        Raises ValueError when there is no row, rows differ in their sums, a document has no key, or queries
        and keys are not aligned at every document's end.
        """
        if len(query_lengths) == 0 or len(query_lengths) != len(key_lengths):
            raise ValueError(f"packing needs at least one row, got {len(query_lengths)} of queries and "
                             f"{len(key_lengths)} of keys")  # fmt: skip
        starts, queries_per_row, keys_per_row = [], -1, -1
        for row, (query_row, key_row) in enumerate(zip(query_lengths, key_lengths, strict=True)):
            queries, keys = np.asarray(query_row, np.int64), np.asarray(key_row, np.int64)
            if queries.shape != keys.shape or queries.ndim != 1 or queries.size == 0:
                raise ValueError(f"row {row} of the packing needs one query and one key length for each document, "
                                 f"got {list(query_row)} and {list(key_row)}")  # fmt: skip
            if (keys < 1).any() or (queries < 0).any():
                raise ValueError(f"row {row} of the packing has a document shorter than one token: {list(key_row)}")
            S, T = int(queries.sum()), int(keys.sum())
            if row == 0:
                queries_per_row, keys_per_row = S, T
            if (queries_per_row, keys_per_row) != (S, T):
                raise ValueError(f"row {row} of the packing has {S} queries and {T} keys, but row 0 has "
                                 f"{queries_per_row} and {keys_per_row}; pad every row to the same length")  # fmt: skip
            ends_apart = np.cumsum(keys) - np.cumsum(queries) != T - S
            if S == 0 or (keys < queries).any() or (ends_apart & (queries > 0)).any():
                raise ValueError(f"row {row} of the packing: queries {list(query_row)} and keys {list(key_row)} "
                                 "do not end together in every document")  # fmt: skip
            starts.append(np.repeat(np.cumsum(keys) - keys, queries))
        all_queries, all_keys = np.concatenate(query_lengths), np.concatenate(key_lengths)
        host_start_BS = np.stack(starts)
        return cls(
            document_start_BS=_copied(torch.from_numpy(host_start_BS), device),
            cu_seqlens_q=_boundaries(all_queries, device),
            cu_seqlens_k=_boundaries(all_keys, device),
            max_seqlen_q=int(all_queries.max()),
            max_seqlen_k=int(all_keys.max()),
            keys_per_row=keys_per_row,
            host_start_BS=host_start_BS,
        )

    def part(self, first_query: int, end_query: int, first_key: int) -> Packing | None:
        """The packing of some queries of every row and of the keys first_key to end_query; rows of whole documents.

        None where every row is left with keys of one document.
        """
        assert self.host_start_BS.shape[1] == self.keys_per_row, "queries that are not all there have no keys to cut"
        queries, keys = [], []
        for starts in self.host_start_BS[:, first_key:end_query]:
            edges = np.concatenate([[0], np.flatnonzero(np.diff(starts)) + 1, [len(starts)]])
            keys.append(np.diff(edges))
            queries.append(np.diff(np.maximum(edges, first_query - first_key)))
        if all(len(row) == 1 for row in keys):
            return None
        return Packing.from_spans(queries, keys, self.document_start_BS.device)

    def to(self, device: torch.device | str) -> Packing:
        """The same packing with its tensors on `device`."""
        return replace(
            self,
            document_start_BS=_copied(self.document_start_BS, device),
            cu_seqlens_q=_copied(self.cu_seqlens_q, device),
            cu_seqlens_k=_copied(self.cu_seqlens_k, device),
            derived={},
        )


def _boundaries(lengths: np.ndarray, device: torch.device | str) -> Tensor:
    return _copied(torch.tensor(np.concatenate([[0], np.cumsum(lengths)]), dtype=torch.int32), device)


def _copied(tensor: Tensor, device: torch.device | str) -> Tensor:
    """The tensor on `device`. From the host to a GPU through pinned memory, so that the host need not wait."""
    if torch.device(device).type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
