"""`prefix.spans` of an instruction corpus: which tokens of each document the assistant said.

Little-endian; all numbers are 64 bits wide:

    8 bytes   MZSPANS\\0
    u64       version, 1
    u64       D, documents
    u64       N, spans
    i64[D+1]  first span of each document, then N
    i64[N,2]  [start, end) of each span, token positions in its document
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megazebra.data.corpus.index_format import REBUILD
from megazebra.data.errors import CorpusError
from megazebra.data.index.documents import end_to_end

MAGIC = b"MZSPANS\x00"
VERSION = 1
HEADER = struct.Struct("<8sQQQ")


class DocumentSpans(NamedTuple):
    """The assistant spans of D documents.

    firsts: int64 [D + 1], the first span of each document, and N.
    bounds: int64 [N, 2], token positions [start, end) in the document; they rise and don't overlap.
    """

    firsts: NDArray[np.int64]
    bounds: NDArray[np.int64]

    @classmethod
    def collect(cls, per_document: Sequence[NDArray[np.integer]]) -> DocumentSpans:
        """One array of [start, end) pairs [k, 2] per document."""
        arrays = [spans.astype(np.int64, copy=False) for spans in per_document]
        firsts = end_to_end(np.array([len(array) for array in arrays], dtype=np.int64))
        return cls(firsts, np.concatenate(arrays) if arrays else np.zeros((0, 2), dtype=np.int64))

    @property
    def tokens(self) -> int:
        """How many tokens lie in the spans."""
        return int((self.bounds[:, 1] - self.bounds[:, 0]).sum())

    def of(self, document: int) -> NDArray[np.int64]:
        """The spans of one document, int64 [k, 2]."""
        return self.bounds[self.firsts[document] : self.firsts[document + 1]]

    def fault(self, document_lengths: NDArray[np.integer]) -> str | None:
        """What is wrong with these spans for documents of these lengths (tokens), None if nothing is."""
        firsts, (starts, ends) = self.firsts, self.bounds.T
        # Compared, not subtracted: differences of arbitrary 64-bit numbers overflow.
        if firsts[0] != 0 or firsts[-1] != len(starts) or (firsts[1:] < firsts[:-1]).any():
            return f"its first spans of documents do not rise from 0 to its {len(starts)} spans"
        counts = np.diff(firsts)
        wrong = (starts < 0) | (ends <= starts) | (ends > np.repeat(document_lengths, counts))
        follows = np.ones(len(starts), dtype=bool)
        follows[firsts[:-1][counts > 0]] = False
        wrong[1:] |= follows[1:] & (starts[1:] < ends[:-1])
        if not wrong.any():
            return None
        span = int(wrong.argmax())
        document = int(np.searchsorted(firsts, span, side="right")) - 1
        return (
            f"document {document} has {document_lengths[document]} tokens and the span {starts[span]} to {ends[span]}, "
            "which is empty, outside it, or overlaps the span before it"
        )


def pack_spans(spans: DocumentSpans) -> bytes:
    """The bytes of a `.spans` file."""
    header = HEADER.pack(MAGIC, VERSION, len(spans.firsts) - 1, len(spans.bounds))
    return b"".join((header, spans.firsts.astype("<i8").tobytes(), spans.bounds.astype("<i8").tobytes()))


def read_spans(path: Path, document_lengths: NDArray[np.integer], crc32: int | None = None) -> DocumentSpans:
    """Read the spans of documents of these lengths (tokens); crc32: of the file, None if it is not known.

    Nothing is allocated before the header's counts have been held against the file's size. Raises CorpusError on
    a wrong magic, version, size or checksum, and where the spans don't fit the documents.
    """
    if not path.is_file():
        raise CorpusError(f"{path} does not exist, although the corpus is one of conversations; {REBUILD}")
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        header = file.read(HEADER.size)
        documents, spans = _parse_header(path, header)
        expected = HEADER.size + 8 * (documents + 1) + 16 * spans
        if size != expected:
            raise CorpusError(
                f"{path}: {documents} documents and {spans} spans take {expected} bytes, the file has {size}; {REBUILD}"
            )
        if documents != len(document_lengths):
            raise CorpusError(
                f"{path} is of {documents} documents, the corpus has {len(document_lengths)}: the files are of "
                f"different builds; {REBUILD}"
            )
        content = file.read(size - HEADER.size)
    if len(content) != size - HEADER.size:
        raise CorpusError(f"{path} became shorter while it was read; {REBUILD}")
    if crc32 is not None and zlib.crc32(content, zlib.crc32(header)) != crc32:
        raise CorpusError(f"{path} does not match its checksum; {REBUILD}")
    numbers = np.frombuffer(content, dtype="<i8")
    read = DocumentSpans(numbers[: documents + 1], numbers[documents + 1 :].reshape(-1, 2))
    if fault := read.fault(document_lengths):
        raise CorpusError(f"{path}: {fault}; {REBUILD}")
    return read


def _parse_header(path: Path, header: bytes) -> tuple[int, int]:
    if header[: len(MAGIC)] != MAGIC:
        raise CorpusError(f"{path} holds no assistant spans: it starts with {header[: len(MAGIC)]!r}, not {MAGIC!r}")
    if len(header) < HEADER.size:
        raise CorpusError(f"{path} is truncated: {len(header)} bytes of a {HEADER.size}-byte header; {REBUILD}")
    _, version, documents, spans = HEADER.unpack(header)
    if version != VERSION:
        raise CorpusError(f"{path} has version {version}; only version {VERSION} is known; {REBUILD}")
    return documents, spans
