"""What every encoder takes and gives."""

from __future__ import annotations

import os
from typing import Any, NamedTuple, Protocol

from numpy.typing import NDArray


class EncodedDocument(NamedTuple):
    """One document to write.

    tokens: integers [n]. spans: int64 [k, 2], what the assistant says, None in plain text. whole: tokens it had
    before it was truncated, None where nothing truncates.
    """

    tokens: NDArray
    spans: NDArray | None = None
    whole: int | None = None

    @property
    def length(self) -> int:
        """In tokens, before it was truncated."""
        return len(self.tokens) if self.whole is None else self.whole


class Refused(NamedTuple):
    """A record that becomes no document.

    reason: words that follow 'it', the same for all records with this fault. details: of this one. length: in
    tokens, 0 where it was not encoded.
    """

    reason: str
    details: str = ""
    length: int = 0


class DocumentEncoder(Protocol):
    """Turns records into documents; a text record is a str, a chat record a parsed JSON object.

    vocab_size: one more than the largest id. eod_id: the token every document ends with, None for none.
    fingerprint: sha256 of the file `save` writes, `file_name`. has_spans: whether documents carry spans.
    recipe: everything that decides the tokens of a record, as JSON; equal recipes give equal tokens.
    description: for people, how it encodes.
    """

    vocab_size: int
    eod_id: int | None
    fingerprint: str
    file_name: str
    has_spans: bool
    recipe: dict[str, Any]

    @property
    def description(self) -> str: ...

    def encode(self, records: list[Any]) -> list[EncodedDocument | Refused]:
        """One document, its EOD included, or refusal for every record, in order."""
        ...

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the tokenizer to `folder` / `file_name` in one step."""
        ...


def is_unicode(text: str) -> bool:
    """Whether UTF-8 can hold the text: JSON's escapes can make half a surrogate pair, which no encoder takes."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
