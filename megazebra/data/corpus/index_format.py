"""Megatron's `.idx`: the one place that knows its bytes.

Little-endian and packed, so no array starts on an 8-byte boundary:

    9 bytes  MMIDIDX\\0\\0
    u64      version, 1
    u8       token type (TOKEN_TYPES)
    u64      S, sequences
    u64      D, documents + 1
    i32[S]   tokens of each sequence
    i64[S]   byte offset of each sequence in .bin
    i64[D]   first sequence of each document, then S; an empty document repeats the entry before it
    i8[S]    mode of each sequence (multimodal corpora only; accepted, not used)
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megazebra.data.errors import CorpusError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
TOKEN_TYPES = {1: "u1", 2: "i1", 3: "i2", 4: "i4", 5: "i8", 6: "f8", 7: "f4", 8: "u2"}
TOKEN_CODES = {np.dtype(name): code for code, name in TOKEN_TYPES.items()}
# Megatron's own threshold; it leaves room for special tokens below 2^16.
SMALL_VOCABULARY = 65_500
LONGEST_SEQUENCE = 2**31 - 1

REBUILD = "build it again with tools/preprocess_data.py --force, or copy it again"


def token_dtype(vocab_size: int) -> np.dtype:
    """The type Megatron stores this vocabulary in: uint16 below 65,500 tokens, else int32."""
    return np.dtype(np.uint16 if vocab_size < SMALL_VOCABULARY else np.int32)


@dataclass(frozen=True)
class IndexArrays:
    """What goes into an `.idx`.

    dtype: of the tokens in .bin.
    sequence_lengths: int32 [S], tokens. sequence_offsets: int64 [S], bytes. document_starts: int64 [D].
    """

    dtype: np.dtype
    sequence_lengths: NDArray[np.int32]
    sequence_offsets: NDArray[np.int64]
    document_starts: NDArray[np.int64]


def pack_index(index: IndexArrays) -> bytes:
    """The bytes of an `.idx` without modes."""
    return b"".join(
        (
            HEADER.pack(
                MAGIC, VERSION, TOKEN_CODES[index.dtype], len(index.sequence_lengths), len(index.document_starts)
            ),
            index.sequence_lengths.astype("<i4").tobytes(),
            index.sequence_offsets.astype("<i8").tobytes(),
            index.document_starts.astype("<i8").tobytes(),
        )
    )


def parse_header(path: str, header: bytes) -> tuple[np.dtype, int, int]:
    """Token type, sequences and document boundaries (documents + 1) that the first bytes of an `.idx` tell.

    Raises CorpusError on a wrong magic, version or token type.
    """
    if header[: len(MAGIC)] != MAGIC:
        raise CorpusError(
            f"{path} is no Megatron index: it starts with {header[: len(MAGIC)]!r}, not {MAGIC!r}; "
            "convert the corpus with tools/preprocess_data.py"
        )
    if len(header) < HEADER.size:
        raise CorpusError(f"{path} is truncated: {len(header)} bytes of a {HEADER.size}-byte header; {REBUILD}")
    _, version, code, sequences, starts = HEADER.unpack(header)
    if version != VERSION:
        raise CorpusError(f"{path} has version {version}; only version {VERSION} is known; {REBUILD}")
    if code not in TOKEN_TYPES:
        known = ", ".join(f"{code} {np.dtype(name)}" for code, name in TOKEN_TYPES.items())
        raise CorpusError(f"{path} has token type {code}; known are {known}; {REBUILD}")
    dtype = np.dtype(TOKEN_TYPES[code])
    if dtype.kind == "f":
        raise CorpusError(f"{path} holds {dtype} values, not token ids; point to a corpus of integer tokens")
    return dtype, sequences, starts
