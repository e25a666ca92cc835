"""Writing a corpus: documents stream into `.bin`, and its files appear together or not at all."""

from __future__ import annotations

import os
import zlib
from array import array
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megazebra.data.corpus.index_format import LONGEST_SEQUENCE, TOKEN_CODES, IndexArrays, pack_index, token_dtype
from megazebra.data.corpus.indexed_corpus import Corpus
from megazebra.data.corpus.integers import as_integers
from megazebra.data.corpus.sidecar import BlockChecksums, CorpusMeta
from megazebra.data.corpus.spans_writer import SpansWriter
from megazebra.data.corpus.token_counts import TokenCounts
from megazebra.data.corpus.unigram import unigram_entropy
from megazebra.data.errors import CorpusError
from megazebra.data.index.documents import end_to_end
from megazebra.data.index.order import Pieces
from megazebra.durable import errors_name, partial_path, sync_folder, write_synced

# Publishing order: whoever sees .idx sees a complete corpus.
SUFFIXES = (".bin", ".spans", ".meta.json", ".idx")
CHUNK_TOKENS = 2**20


class CorpusWriter:
    """Context manager that writes `prefix`.bin, `prefix`.meta.json, `prefix`.idx and, if asked, `prefix`.spans.

    Until the block ends the files carry temporary names in the same folder; an exception removes them.
    Memory: 16 bytes per document; with spans 8 more, and 16 per span. A few times that at the end.

    vocab_size: token ids have to be below it. dtype: integer type of the tokens in .bin, by default the one
    Megatron takes (uint16 below a vocabulary of 65,500, else int32). eod_id is recorded, not appended.
    with_spans: whether documents come with what the assistant says in them.

    Raises CorpusError when dtype can't hold the vocabulary, for token ids and an eod_id outside the vocabulary
    (nothing is ever wrapped), for spans that don't fit their document, and at the end when no token was written.
    """

    def __init__(
        self,
        prefix: str | Path,
        *,
        vocab_size: int,
        dtype: np.dtype | type | None = None,
        eod_id: int | None = None,
        with_spans: bool = False,
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
        if eod_id is not None and not 0 <= eod_id < vocab_size:
            raise CorpusError(f"{prefix}: eod_id={eod_id} is outside the vocabulary of {vocab_size}; give another id")
        self.tokens = 0
        self._counts = TokenCounts(vocab_size)
        self._sequence_lengths = array("q")
        self._document_starts = array("q", [0])
        self._spans = SpansWriter(self.prefix) if with_spans else None
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
        return self._counts.total()

    def add_document(self, tokens: ArrayLike, spans: ArrayLike | None = None) -> None:
        """Append one document; see `add_documents`."""
        self.add_documents([tokens], None if spans is None else [spans])

    def add_documents(self, documents: Sequence[ArrayLike], spans: Sequence[ArrayLike | None] | None = None) -> None:
        """Append documents: integers [n] each, n >= 0. Many at once are much cheaper than one by one.

        spans: of a corpus with them, token positions [start, end) that the assistant says, integers [k, 2] each.
        A document beyond 2^31 - 1 tokens, which the format cannot count, becomes several sequences.
        """
        arrays = [
            as_integers(tokens, (), f"{self.prefix}: document {number}", "give one list of integer token ids")
            for number, tokens in enumerate(documents, self.documents)
        ]
        lengths = np.array([len(ids) for ids in arrays], dtype=np.int64)
        # Joined with their like only: int64 and uint64 would become floats together.
        batches = [np.concatenate(list(alike)) for _, alike in groupby(filter(len, arrays), lambda ids: ids.dtype)]
        checked = 0
        for ids in batches:
            self._check_range(ids, lengths, checked)
            checked += len(ids)
        given = [each for each in spans or () if each is not None]
        self._require_spans(given=bool(given), missing=spans is None or len(given) < len(spans))
        if self._spans is not None:
            self._spans.add(given, lengths)
        for ids in batches:
            self._write(ids)
        self._add_lengths(lengths)

    def append(self, corpus: Corpus) -> None:
        """Append the documents of another corpus, in memory that doesn't grow with its tokens.

        Raises CorpusError for a corpus of a larger or unknown vocabulary, and where one of the two has spans.
        """
        if corpus.vocab_size is None or corpus.vocab_size > self.vocab_size:
            raise CorpusError(
                f"{corpus.prefix} has {corpus.vocab_size or 'an unknown number of'} token ids, {self.prefix} takes "
                f"{self.vocab_size}; open it with a vocab_size of its tokenizer, which has to be the same"
            )
        lengths = corpus.document_lengths.astype(np.int64)
        self._require_spans(given=corpus.has_spans, missing=not corpus.has_spans)
        if self._spans is not None:
            assert corpus.document_spans is not None, f"{corpus.prefix} was opened without spans"
            self._spans.extend(corpus.document_spans, lengths)
        for pieces in _chunks(lengths):
            self._write(corpus.gather(pieces))
        self._add_lengths(lengths)

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
        index, spans = pack_index(self._index()), self._spans.pack() if self._spans else None
        write_synced(self._partial(".idx"), index)
        write_synced(self._partial(".meta.json"), self._meta(index, spans).to_json())
        if spans is not None:
            write_synced(self._partial(".spans"), spans)
        self.withdraw_previous()
        for suffix in SUFFIXES:
            if suffix == ".spans" and spans is None:
                Path(self.prefix + suffix).unlink(missing_ok=True)
            else:
                os.replace(self._partial(suffix), self.prefix + suffix)
            sync_folder(Path(self.prefix).parent)

    def _check_range(self, ids: NDArray[np.integer], lengths: NDArray[np.int64], before: int) -> None:
        """Refuse ids outside the vocabulary; `before` tokens of documents of these lengths precede them."""
        if ids.max() < self.vocab_size and ids.min() >= 0:
            return
        wrong = int(((ids < 0) | (ids >= self.vocab_size)).argmax())
        starts = end_to_end(lengths)
        document = int(np.searchsorted(starts, before + wrong, side="right")) - 1
        raise CorpusError(
            f"{self.prefix}: document {self.documents + document} has token id {ids[wrong]} at position "
            f"{before + wrong - starts[document]}, outside the vocabulary of {self.vocab_size}; encode with the "
            "tokenizer whose vocabulary was given"
        )

    def _write(self, ids: NDArray[np.integer]) -> None:
        stored = ids.astype(self.dtype.newbyteorder("<"), copy=False)
        raw = stored.view(np.uint8).data
        with errors_name(self._partial(".bin")):
            self._bin.write(raw)
        self._checksums.update(raw)
        self.tokens += len(stored)
        self._counts.add(stored)

    def _add_lengths(self, lengths: NDArray[np.int64]) -> None:
        sequences = -(-lengths // LONGEST_SEQUENCE)
        ends = self._document_starts[-1] + np.cumsum(sequences)
        filled = np.full(sequences.sum(), LONGEST_SEQUENCE)
        last = np.cumsum(sequences)[lengths > 0] - 1
        filled[last] = (lengths[lengths > 0] - 1) % LONGEST_SEQUENCE + 1
        self._sequence_lengths.frombytes(filled.tobytes())
        self._document_starts.frombytes(ends.tobytes())

    def _require_spans(self, *, given: bool, missing: bool) -> None:
        """Refuse documents unlike this corpus: some are given spans where it has none, or some miss them."""
        if missing if self._spans else given:
            raise CorpusError(
                f"{self.prefix}: documents from {self.documents} on come {'without' if self._spans else 'with'} "
                "assistant spans, unlike this corpus; keep conversations and plain text in corpora of their own"
            )

    def _index(self) -> IndexArrays:
        lengths = np.array(self._sequence_lengths, dtype=np.int64)
        offsets = (np.cumsum(lengths) - lengths) * self.dtype.itemsize
        starts = np.array(self._document_starts, dtype=np.int64)
        return IndexArrays(self.dtype, lengths.astype(np.int32), offsets, starts)

    def _meta(self, index: bytes, spans: bytes | None) -> CorpusMeta:
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
            "spans_crc32": None if spans is None else zlib.crc32(spans),
            "unigram_entropy": unigram_entropy(self.token_counts),
        }
        return CorpusMeta(**{**fields, **self._recorded})

    def _partial(self, suffix: str) -> Path:
        return partial_path(self.prefix + suffix)


def _chunks(lengths: NDArray[np.int64]) -> Iterator[Pieces]:
    """All tokens of documents of these lengths in order, CHUNK_TOKENS at a time."""
    starts = end_to_end(lengths)
    for begin in range(0, int(starts[-1]), CHUNK_TOKENS):
        end = min(begin + CHUNK_TOKENS, int(starts[-1]))
        documents = np.arange(np.searchsorted(starts, begin, side="right") - 1, np.searchsorted(starts, end))
        documents = documents[lengths[documents] > 0]
        firsts = np.maximum(begin - starts[documents], 0)
        yield Pieces(documents, firsts, np.minimum(lengths[documents], end - starts[documents]) - firsts)
