"""Reading a corpus in Megatron's `.bin`/`.idx` format, with or without our sidecar."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megazebra.data.corpus.bin_file import BinFile
from megazebra.data.corpus.index_format import REBUILD
from megazebra.data.corpus.index_reader import read_index
from megazebra.data.corpus.sidecar import read_meta
from megazebra.data.corpus.spans import DocumentSpans, read_spans
from megazebra.data.errors import CorpusError
from megazebra.data.index.builder import native
from megazebra.data.index.documents import Documents
from megazebra.data.index.order import Pieces
from megazebra.durable import file_crc32

LARGEST_ID = 2**63 - 1


class Corpus:
    """An open corpus: document lengths in memory, tokens read on demand.

    Safe to share between threads and forked processes (reads don't move a file position); pickling it reopens
    the files and checks that they are still the same. Memory: 4 bytes per document, 8 if one is longer than 2^31 - 1
    tokens; with spans 8 more per document, and 16 per span.

    prefix: path without suffix. dtype: of the tokens in .bin. layout: the documents' lengths and where each begins.
    has_spans: whether it is an instruction corpus. document_spans: what the assistant said there; None without spans,
    and where sequences stand for documents.
    meta: the sidecar, None for corpora that Megatron wrote. vocab_size: bound on token ids, None if unknown.
    fingerprint: sha256 over .idx, the size of .bin and, where there is a sidecar, the checksums of .bin and .spans:
    equal for copies wherever they lie. Without a sidecar a change of tokens that keeps every length goes unseen.
    """

    def __init__(
        self,
        prefix: str | os.PathLike[str],
        *,
        vocab_size: int | None = None,
        field: str = "data.path",
        by_sequence: bool = False,
    ) -> None:
        """Open `prefix`.bin and `prefix`.idx, reading the index and holding it against the size of .bin.

        vocab_size: the model's; a corpus made for a larger vocabulary is refused here, and a token id beyond it
        when it is read. field: the configuration key that errors name. by_sequence: take Megatron's sequences for
        documents, as its own order does; they differ where documents are empty or of several sequences.

        Raises CorpusError when a file is missing, truncated, of another format, inconsistent or empty.
        """
        self.prefix = os.fspath(prefix)
        self._field = field
        self._by_sequence = by_sequence
        for suffix in (".idx", ".bin"):
            self._require(suffix)
        self.meta = read_meta(Path(self.prefix + ".meta.json"))
        self._bin = BinFile(self.prefix + ".bin")
        table = read_index(self.prefix, self._bin.size, by_sequence=by_sequence)
        self.dtype = table.dtype
        self.layout = Documents(table.lengths)
        self._offsets = table.offsets
        self._check_meta(table.documents)
        self.vocab_size = self._bound(vocab_size)
        spans, spans_crc32 = Path(self.prefix + ".spans"), self.meta.spans_crc32 if self.meta else None
        self.has_spans = spans.exists() if self.meta is None else spans_crc32 is not None
        self.document_spans: DocumentSpans | None = None
        if self.has_spans and not by_sequence:
            self.document_spans = read_spans(spans, self.document_lengths, spans_crc32)
        content = f"{table.sha256} {self._bin.size} {self.meta.bin_crc32 if self.meta else None}"
        if spans_crc32 is not None:
            content += f" {spans_crc32}"
        self.fingerprint = hashlib.sha256(content.encode()).hexdigest()

    @property
    def documents(self) -> int:
        """How many documents there are."""
        return len(self.layout)

    @property
    def document_lengths(self) -> NDArray[np.integer]:
        """Tokens of each document, int32 or int64 [documents]."""
        return self.layout.lengths

    @property
    def tokens(self) -> int:
        """How many tokens there are."""
        return self.layout.tokens

    def read(self, document: int, start: int = 0, length: int | None = None) -> NDArray[np.int64]:
        """Tokens [start, start + length) of a document, int64 [length]; by default to its end.

        Raises IndexError outside the document, CorpusError when .bin has become shorter since it was opened or
        holds a token id outside the vocabulary.
        """
        if not 0 <= document < self.documents:
            raise IndexError(f"document {document} of {self.documents}")
        size = int(self.document_lengths[document])
        length = size - start if length is None else length
        if start < 0 or length < 0 or start + length > size:
            raise IndexError(f"tokens {start} to {start + length} of document {document}, which has {size}")
        stored = np.empty(length, dtype=self.dtype.newbyteorder("<"))
        self._bin.read_into(stored.view(np.uint8).data, self._offset(document) + start * self.dtype.itemsize)
        tokens = stored.astype(np.int64)
        self._check_ids(tokens, document, start)
        return tokens

    def gather(self, pieces: Pieces, out: NDArray[np.int64] | None = None) -> NDArray[np.int64]:
        """Tokens of pieces of documents, end to end, int64 [sum of their lengths].

        out: where to put them, contiguous and of that shape, such as the row of a batch. Raises what `read` does;
        `out` is undefined then.
        """
        if (builder := native()) is not None:
            gathered = builder.gather(
                self.layout.lengths,
                self.layout.block_starts,
                self.layout.block_documents,
                self._offsets,
                self._bin.descriptor,
                self.dtype,
                LARGEST_ID if self.vocab_size is None else self.vocab_size - 1,
                *pieces,
                out,
            )
            if gathered is not None:
                return gathered
        tokens = int(pieces.lengths.sum())
        if out is None:
            out = np.empty(tokens, dtype=np.int64)
        assert out.shape == (tokens,), f"{tokens} tokens into {list(out.shape)}"
        self._read_each(pieces, out)
        return out

    def spans(self, document: int) -> NDArray[np.int64]:
        """What the assistant said in a document: token positions [start, end), int64 [k, 2]."""
        assert self.document_spans is not None, f"{self.prefix} was opened without spans"
        return self.document_spans.of(document)

    def verify(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Read the files and compare their checksums with the sidecar's; `progress` hears bytes done and in total.

        Raises CorpusError naming the first damaged block, or when there is no sidecar to compare with.
        """
        if self.meta is None:
            raise CorpusError(f"{self.prefix}.meta.json does not exist, so there are no checksums to verify against")
        if file_crc32(self.prefix + ".idx") != self.meta.idx_crc32:
            raise CorpusError(f"{self.prefix}.idx does not match its checksum; {REBUILD}")
        self._bin.verify(self.meta.checksum_block_bytes, self.meta.bin_crc32, progress)

    def close(self) -> None:
        """Close .bin; reading afterwards is an error. Also happens when the corpus is collected."""
        self._bin.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self.prefix, self.vocab_size, self._field, self._by_sequence, self.fingerprint)

    def _require(self, suffix: str) -> None:
        path = self.prefix + suffix
        if os.path.isfile(path):
            return
        name = f"{self._field}={self.prefix!r}"
        if self.prefix.endswith((".bin", ".idx", ".meta.json", ".spans")) and os.path.isfile(self.prefix):
            raise CorpusError(f"{name} is a file; give the prefix without its suffix")
        raise CorpusError(f"{name}: {path} does not exist; build it with tools/preprocess_data.py or correct the path")

    def _check_meta(self, documents: int) -> None:
        if self.meta is None:
            return
        for name, recorded, found in (
            ("tokens", self.meta.tokens, self.tokens),
            ("documents", self.meta.documents, documents),
            ("dtype", self.meta.dtype, self.dtype.name),
            ("bin_bytes", self.meta.bin_bytes, self._bin.size),
        ):
            if recorded != found:
                raise CorpusError(
                    f"{self.prefix}.meta.json records {name} {recorded}, the corpus has {found}: "
                    f"the files are of different builds; {REBUILD}"
                )

    def _bound(self, model_vocab_size: int | None) -> int | None:
        own = self.meta.vocab_size if self.meta else None
        if own is not None and model_vocab_size is not None and own > model_vocab_size:
            raise CorpusError(
                f"{self._field}={self.prefix!r} was made with a vocabulary of {own} tokens, more than "
                f"model.vocab_size={model_vocab_size}; raise model.vocab_size or encode with a smaller tokenizer"
            )
        return model_vocab_size if own is None else own

    def _check_ids(self, tokens: NDArray[np.int64], document: int, start: int) -> None:
        wrong = tokens < 0
        if self.vocab_size is not None:
            wrong |= tokens >= self.vocab_size
        if wrong.any():
            position = int(wrong.argmax())
            bound = "0" if self.vocab_size is None else f"0 to {self.vocab_size - 1}"
            raise CorpusError(
                f"{self.prefix}.bin: document {document} has token id {tokens[position]} at position "
                f"{start + position}, outside the vocabulary ({bound}); use the corpus's own tokenizer and "
                "model.vocab_size, or check the file's integrity"
            )

    def _offset(self, document: int) -> int:
        """The byte a document begins at."""
        if self._offsets is None:
            return self.layout.start(document) * self.dtype.itemsize
        return int(self._offsets[document])

    def _read_each(self, pieces: Pieces, out: NDArray[np.int64]) -> None:
        """`gather` piece by piece: without the compiled kernel, and to say what that one stumbled over."""
        end = 0
        for document, start, length in zip(*(column.tolist() for column in pieces), strict=True):
            out[end : end + length] = self.read(document, start, length)
            end += length


def _reopen(prefix: str, vocab_size: int | None, field: str, by_sequence: bool, fingerprint: str) -> Corpus:
    corpus = Corpus(prefix, vocab_size=vocab_size, field=field, by_sequence=by_sequence)
    if corpus.fingerprint != fingerprint:
        raise CorpusError(f"{field}={prefix!r} has been replaced since it was first opened; start the run again")
    return corpus
