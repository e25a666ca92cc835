"""Reading an `.idx`: in one pass, checked as it comes in, kept as little of as can be."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megazebra.data.corpus.index_format import HEADER, REBUILD, parse_header
from megazebra.data.errors import CorpusError

# The file's 64-bit arrays pass through memory in pieces of this many numbers.
PIECE = 2**17


class DocumentTable(NamedTuple):
    """Where the documents of a corpus lie in its .bin.

    dtype: of the tokens. documents: how many the `.idx` has.
    lengths: tokens of each document (of each sequence, if those were asked for), int32, or int64 where one needs it.
    offsets: int64, the byte each begins at; None when each follows on the one before, the first at byte 0.
    sha256: of the bytes of the `.idx`.
    """

    dtype: np.dtype
    documents: int
    lengths: NDArray[np.integer]
    offsets: NDArray[np.int64] | None
    sha256: str


def read_index(prefix: str, bin_bytes: int, *, by_sequence: bool = False) -> DocumentTable:
    """Read `prefix`.idx and hold it against the size of `prefix`.bin; by_sequence: each sequence is a document.

    Memory: 8 bytes per document while reading, 4 for the result. Nothing is allocated before the header's counts
    have been held against the file's size. Raises CorpusError on a wrong magic, version or token type, where size
    and counts disagree, and when offsets and boundaries don't describe a .bin of this size.
    """
    with open(f"{prefix}.idx", "rb", buffering=0) as file:
        return _IndexReader(prefix, bin_bytes, file).read(by_sequence)


class _IndexReader:
    def __init__(self, prefix: str, bin_bytes: int, file: BinaryIO) -> None:
        self._path, self._bin, self._bin_bytes = f"{prefix}.idx", f"{prefix}.bin", bin_bytes
        self._file = file
        self._sha256 = hashlib.sha256()

    def read(self, by_sequence: bool) -> DocumentTable:
        dtype, sequences, documents, modes = self._header()
        lengths = self._array("<i4", sequences)
        if documents < 0 or not lengths.any():
            raise CorpusError(f"{self._path} holds no tokens; {REBUILD}")
        offsets = self._offsets(lengths, dtype.itemsize)
        by_document = self._documents(lengths, offsets, documents, dtype.itemsize)
        self._array("i1", modes)
        kept = (lengths, offsets) if by_sequence else by_document
        return DocumentTable(dtype, documents, kept[0], kept[1], self._sha256.hexdigest())

    def _header(self) -> tuple[np.dtype, int, int, int]:
        """Token type; how many sequences, documents and modes there are."""
        size = os.fstat(self._file.fileno()).st_size
        header = self._file.read(HEADER.size)
        self._sha256.update(header)
        dtype, sequences, boundaries = parse_header(self._path, header)
        expected = HEADER.size + 12 * sequences + 8 * boundaries
        if size not in (expected, expected + sequences):
            state = "truncated" if size < expected else "of another size than its header says"
            raise CorpusError(
                f"{self._path} is {state}: {sequences} sequences and {boundaries} document boundaries take {expected} "
                f"bytes, the file has {size}; {REBUILD}"
            )
        return dtype, sequences, boundaries - 1, size - expected

    def _array(self, kind: str, count: int) -> NDArray:
        """The file's next `count` numbers."""
        array = np.empty(count, dtype=kind)
        left = array.view(np.uint8).data
        while len(left):
            got = self._file.readinto(left)  # type: ignore[attr-defined]  # of a raw file
            if not got:
                raise CorpusError(f"{self._path} became shorter while it was read; {REBUILD}")
            self._sha256.update(left[:got])
            left = left[got:]
        return array

    def _offsets(self, lengths: NDArray[np.int32], itemsize: int) -> NDArray[np.int64] | None:
        """The byte each sequence begins at; None when each follows on the one before."""
        offsets = None
        end = farthest = 0
        for piece in _pieces(len(lengths)):
            sizes = lengths[piece].astype(np.int64) * itemsize
            begins = self._array("<i8", len(sizes))
            # Bounding the offsets first keeps the sum from overflowing.
            sane = (sizes >= 0) & (begins >= 0) & (begins <= self._bin_bytes)
            ends = np.where(sane, begins, 0) + sizes
            wrong = ~sane | (ends > self._bin_bytes)
            if wrong.any():
                at = int(wrong.argmax())
                raise CorpusError(
                    f"{self._path}: sequence {piece.start + at} has {sizes[at] // itemsize} tokens from byte "
                    f"{begins[at]}, outside the {self._bin_bytes} bytes of {self._bin}: .bin is truncated or of "
                    f"another build; {REBUILD}"
                )
            if offsets is None and (begins[0] != end or (begins[1:] != ends[:-1]).any()):
                offsets = np.zeros(len(lengths), dtype=np.int64)
                np.cumsum(lengths[: piece.start] * np.int64(itemsize), out=offsets[1 : piece.start + 1])
            if offsets is not None:
                offsets[piece] = begins
            end, farthest = int(ends[-1]), max(farthest, int(ends.max()))
        if farthest != self._bin_bytes:
            raise CorpusError(
                f"{self._bin} has {self._bin_bytes} bytes, {self._path} accounts for {farthest}: the files are of "
                f"different builds; {REBUILD}"
            )
        return offsets

    def _documents(
        self, lengths: NDArray[np.int32], offsets: NDArray[np.int64] | None, documents: int, itemsize: int
    ) -> tuple[NDArray[np.integer], NDArray[np.int64] | None]:
        """Tokens of each document and the byte it begins at."""
        tokens: NDArray[np.integer] = np.zeros(documents, dtype=np.int32)
        begins = np.zeros(0 if offsets is None else documents, dtype=np.int64)
        start = int(self._array("<i8", 1)[0])
        rising = start == 0
        for piece in _pieces(documents):
            ends = self._array("<i8", piece.stop - piece.start)
            starts = np.concatenate(([start], ends[:-1]))
            start = int(ends[-1])
            # Compared, not subtracted: differences of arbitrary 64-bit numbers overflow.
            rising = rising and bool((starts <= ends).all()) and start <= len(lengths)
            if not rising:
                break
            filled = starts < ends
            firsts = starts[filled]
            if len(firsts) == 0:
                continue
            sums = np.add.reduceat(lengths[firsts[0] : start], firsts - firsts[0], dtype=np.int64)
            if sums.max() > np.iinfo(np.int32).max:
                tokens = tokens.astype(np.int64, copy=False)
            tokens[piece][filled] = sums
            if offsets is not None:
                self._check_whole(firsts, start, offsets, lengths, itemsize)
                begins[piece][filled] = offsets[firsts]
        if not rising or start != len(lengths):
            raise CorpusError(
                f"{self._path}: document boundaries do not rise from 0 to its {len(lengths)} sequences; {REBUILD}"
            )
        return tokens, None if offsets is None else begins

    def _check_whole(
        self, firsts: NDArray, stop: int, offsets: NDArray, lengths: NDArray[np.int32], itemsize: int
    ) -> None:
        """Refuse documents whose sequences lie apart; they begin at sequences `firsts`, the last one ends at `stop`."""
        first = int(firsts[0])
        ends = offsets[first : stop - 1] + lengths[first : stop - 1] * np.int64(itemsize)
        apart = offsets[first + 1 : stop] != ends
        apart[firsts[1:] - first - 1] = False
        if apart.any():
            raise CorpusError(
                f"{self._path}: sequence {first + 1 + apart.argmax()} does not follow on the one before it although "
                f"both are of one document; {REBUILD}"
            )


def _pieces(count: int) -> Iterator[slice]:
    return (slice(first, min(first + PIECE, count)) for first in range(0, count, PIECE))
