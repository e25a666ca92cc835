"""Reading a corpus in Megatron's `.bin`/`.idx` format, with or without our sidecar.

Nothing is memory-mapped: a mapped file that is truncated or rewritten in place kills the process with a bus
error, while `pread` reports a short read, and the page cache is shared either way.
"""

from __future__ import annotations

import hashlib
import os
import weakref
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megazebra.data.corpus.index_format import REBUILD, IndexArrays, read_index
from megazebra.data.corpus.sidecar import BlockChecksums, read_meta
from megazebra.data.errors import CorpusError

READ_BYTES = 2**20


class Corpus:
    """An open corpus: document lengths in memory, tokens read on demand.

    Safe to share between threads and forked processes (reads don't move a file position); pickling it reopens
    the files and checks that they are still the same.

    prefix: path without suffix. dtype: of the tokens in .bin. tokens: how many there are.
    document_lengths: int64 [documents], tokens of each.
    meta: the sidecar, None for corpora that Megatron wrote. vocab_size: bound on token ids, None if unknown.
    fingerprint: sha256 over .idx, the size of .bin and, where there is a sidecar, the checksums of .bin: equal
    for copies wherever they lie. Without a sidecar a change of tokens that keeps every length goes unseen.
    """

    def __init__(self, prefix: str | os.PathLike[str], *, vocab_size: int | None = None, field: str = "data.path"):
        self.prefix = os.fspath(prefix)
        self._field = field
        for suffix in (".idx", ".bin"):
            self._require(suffix)
        index, idx_sha256 = read_index(Path(self.prefix + ".idx"))
        self.dtype = index.dtype
        self.meta = read_meta(Path(self.prefix + ".meta.json"))
        self._bin = os.open(self.prefix + ".bin", os.O_RDONLY | os.O_CLOEXEC)
        self._close = weakref.finalize(self, os.close, self._bin)
        self._bin_bytes = os.fstat(self._bin).st_size
        _check_index(self.prefix, index, self._bin_bytes)
        self.document_lengths, self._document_offsets = _documents(index)
        self.tokens = int(self.document_lengths.sum())
        self._check_meta()
        self.vocab_size = self._bound(vocab_size)
        checksums = self.meta.bin_crc32 if self.meta else None
        self.fingerprint = hashlib.sha256(f"{idx_sha256} {self._bin_bytes} {checksums}".encode()).hexdigest()

    @classmethod
    def open(cls, prefix: str | os.PathLike[str], *, vocab_size: int | None = None, field: str = "data.path") -> Corpus:
        """Open `prefix`.bin and `prefix`.idx, reading the index and holding it against the size of .bin.

        vocab_size: the model's; a corpus made for a larger vocabulary is refused here, and a token id beyond it
        when it is read. field: the configuration key that errors name.

        Raises CorpusError when a file is missing, truncated, of another format, inconsistent or empty.
        """
        return cls(prefix, vocab_size=vocab_size, field=field)

    @property
    def documents(self) -> int:
        return len(self.document_lengths)

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
        offset = int(self._document_offsets[document]) + start * self.dtype.itemsize
        self._read_exactly(stored.view(np.uint8).data, offset)
        tokens = stored.astype(np.int64)
        self._check_ids(tokens, document, start)
        return tokens

    def verify(self) -> None:
        """Read both files and compare their checksums with the sidecar's.

        Raises CorpusError naming the first damaged block, or when there is no sidecar to compare with.
        """
        if self.meta is None:
            raise CorpusError(f"{self.prefix}.meta.json does not exist, so there are no checksums to verify against")
        if zlib.crc32(Path(self.prefix + ".idx").read_bytes()) != self.meta.idx_crc32:
            raise CorpusError(f"{self.prefix}.idx does not match its checksum; {REBUILD}")
        checksums = BlockChecksums(self.meta.checksum_block_bytes)
        for offset in range(0, self._bin_bytes, READ_BYTES):
            chunk = bytearray(min(READ_BYTES, self._bin_bytes - offset))
            self._read_exactly(memoryview(chunk), offset)
            checksums.update(chunk)
        if len(checksums.blocks) != len(self.meta.bin_crc32):
            raise CorpusError(
                f"{self.prefix}.meta.json has {len(self.meta.bin_crc32)} checksums for {len(checksums.blocks)} "
                f"blocks of .bin; {REBUILD}"
            )
        for block, (found, recorded) in enumerate(zip(checksums.blocks, self.meta.bin_crc32, strict=True)):
            if found != recorded:
                start = block * checksums.block_bytes
                raise CorpusError(
                    f"{self.prefix}.bin does not match its checksum in block {block}, bytes {start} to "
                    f"{min(start + checksums.block_bytes, self._bin_bytes)}; {REBUILD}"
                )

    def close(self) -> None:
        """Close .bin; reading afterwards is an error. Also happens when the corpus is collected."""
        self._close()
        self._bin = -1  # the number may soon be another file's

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self.prefix, self.vocab_size, self._field, self.fingerprint)

    def _require(self, suffix: str) -> None:
        path = self.prefix + suffix
        if os.path.isfile(path):
            return
        name = f"{self._field}={self.prefix!r}"
        if self.prefix.endswith((".bin", ".idx", ".meta.json")) and os.path.isfile(self.prefix):
            raise CorpusError(f"{name} is a file; give the prefix without its suffix")
        raise CorpusError(f"{name}: {path} does not exist; build it with tools/preprocess_data.py or correct the path")

    def _check_meta(self) -> None:
        if self.meta is None:
            return
        for name, recorded, found in (
            ("tokens", self.meta.tokens, self.tokens),
            ("documents", self.meta.documents, self.documents),
            ("dtype", self.meta.dtype, self.dtype.name),
            ("bin_bytes", self.meta.bin_bytes, self._bin_bytes),
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

    def _read_exactly(self, target: memoryview, offset: int) -> None:
        """Fill `target` from .bin; the kernel may hand out less than asked (2 GB at most) at a time."""
        while len(target):
            count = os.preadv(self._bin, [target], offset)
            if count == 0:
                raise CorpusError(
                    f"{self.prefix}.bin ends at byte {offset} although it had {self._bin_bytes} bytes when it was "
                    f"opened: it was truncated or rewritten in place; {REBUILD}"
                )
            target = target[count:]
            offset += count


def _reopen(prefix: str, vocab_size: int | None, field: str, fingerprint: str) -> Corpus:
    corpus = Corpus(prefix, vocab_size=vocab_size, field=field)
    if corpus.fingerprint != fingerprint:
        raise CorpusError(f"{field}={prefix!r} has been replaced since it was first opened; start the run again")
    return corpus


def _check_index(prefix: str, index: IndexArrays, bin_bytes: int) -> None:
    """Refuse boundaries and offsets that don't describe a .bin of this size."""
    path, starts, sequences = f"{prefix}.idx", index.document_starts, len(index.sequence_lengths)
    # Compared, not subtracted: differences of arbitrary 64-bit numbers overflow.
    if len(starts) == 0 or starts[0] != 0 or starts[-1] != sequences or (starts[1:] < starts[:-1]).any():
        raise CorpusError(f"{path}: document boundaries do not rise from 0 to its {sequences} sequences; {REBUILD}")
    if sequences == 0 or not index.sequence_lengths.any():
        raise CorpusError(f"{path} holds no tokens; {REBUILD}")
    lengths = index.sequence_lengths.astype(np.int64)
    # Bounding the offsets first keeps the sum below from overflowing.
    sane = (lengths >= 0) & (index.sequence_offsets >= 0) & (index.sequence_offsets <= bin_bytes)
    ends = np.where(sane, index.sequence_offsets, 0) + lengths * index.dtype.itemsize
    wrong = np.flatnonzero(~sane | (ends > bin_bytes))
    if wrong.size:
        first = wrong[0]
        raise CorpusError(
            f"{path}: sequence {first} has {lengths[first]} tokens from byte {index.sequence_offsets[first]}, outside "
            f"the {bin_bytes} bytes of {prefix}.bin: .bin is truncated or of another build; {REBUILD}"
        )
    if ends.max() != bin_bytes:
        raise CorpusError(
            f"{prefix}.bin has {bin_bytes} bytes, {path} accounts for {ends.max()}: the files are of different "
            f"builds; {REBUILD}"
        )
    # Every document is one byte range, as all of Megatron's writers lay it out.
    breaks = np.flatnonzero(index.sequence_offsets[1:] != ends[:-1]) + 1
    torn = breaks[~np.isin(breaks, starts)]
    if torn.size:
        raise CorpusError(
            f"{path}: sequence {torn[0]} does not follow on the one before it although both are of one document; "
            f"{REBUILD}"
        )


def _documents(index: IndexArrays) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Tokens and byte offset of every document, both int64 [documents]."""
    tokens_before = np.concatenate(([0], np.cumsum(index.sequence_lengths, dtype=np.int64)))
    lengths = np.diff(tokens_before[index.document_starts])
    # An empty last document starts behind the last sequence; its offset is never used.
    firsts = np.minimum(index.document_starts[:-1], len(index.sequence_offsets) - 1)
    return lengths, index.sequence_offsets[firsts].astype(np.int64)
