"""Corpora put together by hand, byte by byte as the format's description has it; nothing of the package is used."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path


def pack_idx(
    code: int, lengths: Sequence[int], offsets: Sequence[int], boundaries: Sequence[int], modes: bytes = b""
) -> bytes:
    """An .idx: token type, tokens and first byte of each sequence, first sequence of each document and the end."""
    sequences, ends = len(lengths), len(boundaries)
    return (
        struct.pack("<9sQBQQ", b"MMIDIDX", 1, code, sequences, ends)
        + struct.pack(f"<{sequences}i{sequences}q{ends}q", *lengths, *offsets, *boundaries)
        + modes
    )


def place(folder: Path, idx: bytes, bin_: bytes) -> Path:
    """Write both files; returns the prefix."""
    prefix = folder / "corpus"
    for path, content in ((Path(f"{prefix}.idx"), idx), (Path(f"{prefix}.bin"), bin_)):
        path.unlink(missing_ok=True)  # some file systems wait for the disk when a file is overwritten
        path.write_bytes(content)
    return prefix
