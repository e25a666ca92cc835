"""Writing a corpus: documents stream into `.bin`, and the three files appear together or not at all."""

from __future__ import annotations

import os
import zlib
from array import array
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megazebra.data.corpus.index_format import LONGEST_SEQUENCE, TOKEN_CODES, IndexArrays, pack_index, token_dtype
from megazebra.data.corpus.sidecar import BlockChecksums, CorpusMeta
from megazebra.data.errors import CorpusError
from megazebra.data.prepare.unigram import unigram_entropy
from megazebra.durable import partial_path, sync_folder, write_synced

# Publishing order: whoever sees .idx sees a complete corpus.
SUFFIXES = (".bin", ".meta.json", ".idx")
COUNT_TOKENS = 2**20


class CorpusWriter:
    """Context manager that writes `prefix`.bin, `prefix`.meta.json and `prefix`.idx.

    Until the block ends the files carry temporary names in the same folder; an exception removes them.
    Memory: 8 bytes per document plus 16 per non-empty one.

    vocab_size: token ids have to be below it. dtype: integer type of the tokens in .bin, by default the one
    Megatron takes (uint16 below a vocabulary of 65,500, else int32). eod_id is recorded, not appended.

    Raises CorpusError when dtype can't hold the vocabulary, for token ids outside the vocabulary (nothing is
    ever wrapped), and at the end when no token was written.
    """

    def __init__(
        self, prefix: str | Path, *, vocab_size: int, dtype: np.dtype | type | None = None, eod_id: int | None = None
    ) -> None:
        self.prefix = str(prefix)
        self.vocab_size = vocab_size
        self.dtype = np.dtype(dtype) if dtype is not None else token_dtype(vocab_size)
        self.eod_id = eod_id
        if self.dtype not in TOKEN_CODES or self.dtype.kind == "f":
            raise CorpusError(f"{prefix}: {self.dtype} is no token type of this format; use uint16 or int32")
        if vocab_size < 1 or vocab_size - 1 > np.iinfo(self.dtype).max:
            raise CorpusError(
                f"{prefix}: {self.dtype} cannot hold a vocabulary of {vocab_size} tokens; leave dtype out to take "
                f"{token_dtype(vocab_size)}"
            )
        self.tokens = 0
        self._counts: NDArray[np.int64] = np.zeros(vocab_size, dtype=np.int64)
        self._uncounted: list[NDArray[np.int64]] = []
        self._uncounted_tokens = 0
        self._sequence_lengths = array("q")
        self._document_starts = array("q", [0])
        self._checksums = BlockChecksums()
        self._recorded: dict[str, Any] = {}

    def __enter__(self) -> CorpusWriter:
        Path(self.prefix).parent.mkdir(parents=True, exist_ok=True)
        self._bin = open(self._partial(".bin"), "wb", buffering=2**20)
        return self

    @property
    def documents(self) -> int:
        return len(self._document_starts) - 1

    @property
    def token_counts(self) -> NDArray[np.int64]:
        """How often each token was written so far, int64 [vocab_size]."""
        if self._uncounted:
            self._counts += np.bincount(np.concatenate(self._uncounted), minlength=self.vocab_size)
            self._uncounted, self._uncounted_tokens = [], 0
        return self._counts

    def add_document(self, tokens: ArrayLike) -> None:
        """Append one document: integers [n], n >= 0.

        A document beyond 2^31 - 1 tokens, which the format cannot count, becomes several sequences.
        """
        ids = self._checked(np.asarray(tokens))
        raw = ids.astype(self.dtype.newbyteorder("<")).tobytes()
        self._bin.write(raw)
        self._checksums.update(raw)
        self._count(ids)
        self._sequence_lengths.extend(
            min(LONGEST_SEQUENCE, len(ids) - start) for start in range(0, len(ids), LONGEST_SEQUENCE)
        )
        self._document_starts.append(len(self._sequence_lengths))

    def add_documents(self, documents: Sequence[ArrayLike]) -> None:
        for tokens in documents:
            self.add_document(tokens)

    def record(self, **fields: Any) -> None:
        """Set fields of the sidecar (CorpusMeta) that the tokens alone don't tell."""
        self._recorded.update(fields)

    def withdraw_previous(self) -> None:
        """Remove the `.idx` of an older corpus of this name, so that none of its files can pair with a new one."""
        Path(self.prefix + ".idx").unlink(missing_ok=True)
        sync_folder(Path(self.prefix).parent)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._publish()
        finally:
            self._bin.close()
            for suffix in SUFFIXES:
                self._partial(suffix).unlink(missing_ok=True)

    def _publish(self) -> None:
        if self.tokens == 0:
            raise CorpusError(f"{self.prefix}: no tokens were written; give inputs that hold text")
        self._bin.flush()
        os.fsync(self._bin.fileno())
        index = pack_index(self._index())
        write_synced(self._partial(".idx"), index)
        write_synced(self._partial(".meta.json"), self._meta(index).to_json())
        self.withdraw_previous()
        for suffix in SUFFIXES:
            os.replace(self._partial(suffix), self.prefix + suffix)
            sync_folder(Path(self.prefix).parent)

    def _checked(self, ids: NDArray) -> NDArray:
        if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
            raise CorpusError(
                f"{self.prefix}: document {self.documents} is {ids.dtype} {list(ids.shape)}; "
                "give one list of integer token ids"
            )
        outside = np.flatnonzero((ids < 0) | (ids >= self.vocab_size))
        if outside.size:
            raise CorpusError(
                f"{self.prefix}: document {self.documents} has token id {ids[outside[0]]} at position {outside[0]}, "
                f"outside the vocabulary of {self.vocab_size}; encode with the tokenizer whose vocabulary was given"
            )
        return ids

    def _count(self, ids: NDArray) -> None:
        self.tokens += len(ids)
        self._uncounted.append(ids.astype(np.int64))
        self._uncounted_tokens += len(ids)
        # Counting walks the whole vocabulary, so short documents are counted together.
        if self._uncounted_tokens >= COUNT_TOKENS:
            _ = self.token_counts

    def _index(self) -> IndexArrays:
        lengths = np.array(self._sequence_lengths, dtype=np.int64)
        offsets = (np.cumsum(lengths) - lengths) * self.dtype.itemsize
        starts = np.array(self._document_starts, dtype=np.int64)
        return IndexArrays(self.dtype, lengths.astype(np.int32), offsets, starts)

    def _meta(self, index: bytes) -> CorpusMeta:
        fields: dict[str, Any] = {
            "tokens": self.tokens,
            "documents": self.documents,
            "vocab_size": self.vocab_size,
            "dtype": self.dtype.name,
            "eod_id": self.eod_id,
            "bin_bytes": self.tokens * self.dtype.itemsize,
            "checksum_block_bytes": self._checksums.block_bytes,
            "bin_crc32": self._checksums.blocks,
            "idx_crc32": zlib.crc32(index),
            "unigram_entropy": unigram_entropy(self.token_counts),
        }
        return CorpusMeta(**{**fields, **self._recorded})

    def _partial(self, suffix: str) -> Path:
        return partial_path(self.prefix + suffix)
