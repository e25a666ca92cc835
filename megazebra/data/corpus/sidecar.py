"""`prefix.meta.json`: what Megatron's two files don't say, and checksums of what they do."""

from __future__ import annotations

import dataclasses
import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megazebra.data.errors import CorpusError

FORMAT = "megazebra-corpus"
VERSION = 1
MEND = "restore it, or remove it to go without checksums"
CHECKSUM_BLOCK_BYTES = 16 * 2**20


@dataclass(frozen=True, kw_only=True)
class CorpusMeta:
    """The fields of `prefix.meta.json`; lengths in tokens, entropies in nats per token."""

    tokens: int
    documents: int
    vocab_size: int
    dtype: str
    eod_id: int | None
    bin_bytes: int
    checksum_block_bytes: int
    bin_crc32: list[int]
    idx_crc32: int
    unigram_entropy: float
    """Entropy of the corpus's own token frequencies."""
    spans_crc32: int | None = None
    """Instruction corpora: of `prefix.spans`."""
    unigram_cross_entropy: float | None = None
    """Held-out corpora: the loss of the training corpus's token frequencies here, the bar to beat."""
    tokenizer: dict[str, str] | None = None
    """`path` of tokenizer.json relative to this file's folder, and `fingerprint`, its sha256."""
    inputs: dict[str, Any] | None = None
    """Files, bytes and manifest hash of the text the corpus was made from."""
    request: dict[str, Any] | None = None
    """Everything that decided the corpus's content: an equal request needs no new build."""

    def to_json(self) -> bytes:
        fields = {"format": FORMAT, "version": VERSION, **dataclasses.asdict(self)}
        return (json.dumps(fields, indent=1, sort_keys=True) + "\n").encode()


# The fields Corpus computes with, and what they have to be.
_CHECKED = {
    "tokens": int,
    "documents": int,
    "vocab_size": int,
    "dtype": str,
    "bin_bytes": int,
    "checksum_block_bytes": int,
    "bin_crc32": list,
    "idx_crc32": int,
    "unigram_entropy": float,
}


def read_meta(path: Path) -> CorpusMeta | None:
    """The sidecar at `path`, or None where there is none (corpora that Megatron wrote).

    Raises CorpusError when it is no JSON, of another format, or lacks fields.
    """
    try:
        fields = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise CorpusError(f"{path} is not JSON ({error}); {MEND}") from error
    if not isinstance(fields, dict) or fields.get("format") != FORMAT or fields.get("version") != VERSION:
        raise CorpusError(f"{path} is no {FORMAT} of version {VERSION}; {MEND}")
    known = {field.name for field in dataclasses.fields(CorpusMeta)}
    wrong = [name for name, kind in _CHECKED.items() if not isinstance(fields.get(name), kind)]
    if not wrong and fields["checksum_block_bytes"] < 1:
        wrong.append("checksum_block_bytes")
    if not wrong and not all(isinstance(checksum, int) for checksum in fields["bin_crc32"]):
        wrong.append("bin_crc32")
    if wrong:
        raise CorpusError(f"{path} has no usable {', '.join(wrong)}; {MEND}")
    fields.setdefault("eod_id", None)
    return CorpusMeta(**{name: value for name, value in fields.items() if name in known})


class BlockChecksums:
    """CRC-32 of every block of a stream, whatever pieces it arrives in."""

    def __init__(self, block_bytes: int = CHECKSUM_BLOCK_BYTES) -> None:
        self.block_bytes = block_bytes
        self._complete: list[int] = []
        self._crc = 0
        self._filled = 0

    def update(self, data: bytes | bytearray | memoryview) -> None:
        view = memoryview(data)
        while len(view):
            piece = view[: self.block_bytes - self._filled]
            self._crc = zlib.crc32(piece, self._crc)
            self._filled += len(piece)
            view = view[len(piece) :]
            if self._filled == self.block_bytes:
                self._complete.append(self._crc)
                self._crc = self._filled = 0

    @property
    def blocks(self) -> list[int]:
        """One CRC per block, the last one of what there is of it."""
        return [*self._complete, self._crc] if self._filled else list(self._complete)
