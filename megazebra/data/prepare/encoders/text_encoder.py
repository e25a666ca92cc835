"""Texts to documents, whatever engine encodes them."""

from __future__ import annotations

import copy
import hashlib
import os
from pathlib import Path
from typing import Any

from megazebra.data.prepare.encoders.encoded import EncodedDocument, Refused, is_unicode
from megazebra.data.prepare.encoders.engines import Engine
from megazebra.durable import write_atomically


class TextEncoder:
    """A DocumentEncoder.

    engine: encodes, EOD included. content: of the tokenizer's file, to be saved as `file_name`.
    """

    has_spans = False

    def __init__(self, engine: Engine, content: bytes, file_name: str, *, vocab_size: int, eod_id: int | None) -> None:
        self.engine = engine
        self.content = content
        self.file_name = file_name
        self.vocab_size = vocab_size
        self.eod_id = eod_id
        self.fingerprint = hashlib.sha256(content).hexdigest()
        self.recipe: dict[str, Any] = {"tokenizer": self.fingerprint, "eod_id": eod_id}

    def with_engine(self, engine: Engine) -> TextEncoder:
        """The same but for what encodes."""
        other = copy.copy(self)
        other.engine = engine
        return other

    @property
    def description(self) -> str:
        return self.engine.description

    def encode(self, records: list[Any]) -> list[EncodedDocument | Refused]:
        fit = [is_unicode(text) for text in records]
        encoded = iter(self.engine([text for text, good in zip(records, fit, strict=True) if good]))
        return [EncodedDocument(next(encoded)) if good else Refused("holds half a surrogate pair") for good in fit]

    def save(self, folder: str | os.PathLike[str]) -> None:
        write_atomically(Path(folder, self.file_name), self.content)
