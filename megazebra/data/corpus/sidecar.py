"""`prefix.meta.json`: what Megatron's two files don't say, and checksums of what they do."""

from __future__ import annotations

import dataclasses
import json
import reprlib
import zlib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError
from pydantic.dataclasses import dataclass

from megazebra.data.errors import CorpusError

FORMAT = "megazebra-corpus"
VERSION = 1
MEND = "restore it, or remove it to go without checksums"
CHECKSUM_BLOCK_BYTES = 16 * 2**20


@dataclass(frozen=True, kw_only=True, config=ConfigDict(strict=True, allow_inf_nan=False))
class CorpusMeta:
    """The fields of `prefix.meta.json`; lengths in tokens, entropies in nats per token.

    Raises pydantic's ValidationError, a ValueError, for a field that is not what its annotation says.
    """

    tokens: NonNegativeInt
    documents: NonNegativeInt
    vocab_size: Annotated[int, Field(ge=1, le=2**63)]
    dtype: str
    eod_id: NonNegativeInt | None = None
    """Below vocab_size."""
    bin_bytes: NonNegativeInt
    checksum_block_bytes: PositiveInt
    bin_crc32: list[NonNegativeInt]
    idx_crc32: NonNegativeInt
    unigram_entropy: float
    """Entropy of the corpus's own token frequencies."""
    spans_crc32: NonNegativeInt | None = None
    """Instruction corpora: of `prefix.spans`."""
    unigram_cross_entropy: float | None = None
    """Held-out corpora: the loss of the training corpus's token frequencies here, the bar to beat."""
    tokenizer: Annotated[dict[Literal["path", "fingerprint"], str], Field(min_length=2)] | None = None
    """`path` of tokenizer.json relative to this file's folder, and `fingerprint`, its sha256."""
    inputs: dict[str, Any] | None = None
    """Files, bytes and manifest hash of the text the corpus was made from."""
    request: dict[str, Any] | None = None
    """Everything that decided the corpus's content: an equal request needs no new build."""

    def to_json(self) -> bytes:
        fields = {"format": FORMAT, "version": VERSION, **dataclasses.asdict(self)}
        return (json.dumps(fields, indent=1, sort_keys=True) + "\n").encode()


def read_meta(path: Path) -> CorpusMeta | None:
    """The sidecar at `path`, or None where there is none (corpora that Megatron wrote).

    Raises CorpusError when it is no JSON, of another format, or a field is missing or unusable.
    """
    try:
        fields = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise CorpusError(f"{path} is not JSON ({error}); {MEND}") from error
    if not isinstance(fields, dict) or fields.get("format") != FORMAT or fields.get("version") != VERSION:
        raise CorpusError(f"{path} is no {FORMAT} of version {VERSION}; {MEND}")
    known = {field.name for field in dataclasses.fields(CorpusMeta)}
    try:
        meta = CorpusMeta(**{name: value for name, value in fields.items() if name in known})
    except ValidationError as error:
        wrong = list(dict.fromkeys(str(fault["loc"][0]) for fault in error.errors()))
    else:
        wrong = ["eod_id"] if meta.eod_id is not None and meta.eod_id >= meta.vocab_size else []
    if wrong:
        found = ", ".join(f"{name} ({reprlib.repr(fields[name]) if name in fields else 'missing'})" for name in wrong)
        raise CorpusError(f"{path} has no usable {found}; {MEND}")
    return meta


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
