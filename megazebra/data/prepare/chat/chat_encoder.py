"""Conversations to tokens and assistant spans."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tokenizers import Encoding, Tokenizer

from megazebra.data.errors import CorpusError
from megazebra.data.prepare.chat.chat_template import ChatTemplate
from megazebra.data.prepare.chat.conversations import read_conversation
from megazebra.data.prepare.chat.jinja_template import ConversationError
from megazebra.data.prepare.encoders.encoded import EncodedDocument, Refused, is_unicode
from megazebra.data.prepare.encoders.tokenizer import added_tokens, serialize, vocab_size
from megazebra.durable import write_atomically


class ChatEncoder:
    """Chat records to documents with spans; a DocumentEncoder.

    The template's text is encoded as a whole, its special tokens as such and no others added. A token belongs to
    what the assistant says if it begins there; one that begins before and reaches in does not.

    messages: key of a record's messages. max_tokens, overlong: a conversation that is longer, EOD included, is kept
    as it is, dropped (refused), truncated, or an error. Refused as well are conversations in whose contents a
    special token or a marker of the template stands: it would forge a turn.
    """

    file_name = "tokenizer.json"
    has_spans = True

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        *,
        eod_id: int | None = None,
        messages: str = "messages",
        max_tokens: int | None = None,
        overlong: Literal["keep", "drop", "truncate", "error"] = "keep",
    ) -> None:
        if overlong != "keep" and (max_tokens is None or max_tokens < 1):
            raise CorpusError(f"conversations to {overlong} are those beyond --max-tokens; give it, at least 1")
        self.vocab_size = vocab_size(tokenizer)
        self.eod_id = eod_id
        self._content = serialize(tokenizer)
        self.fingerprint = hashlib.sha256(self._content).hexdigest()
        self._template = template
        self._key = messages
        self._max_tokens = max_tokens
        self._overlong = overlong
        self.recipe: dict[str, Any] = {
            "tokenizer": self.fingerprint,
            "eod_id": eod_id,
            "template": template.fingerprint,
            "messages": messages,
            "overlong": None if overlong == "keep" else [overlong, max_tokens],
        }
        reserved = sorted(template.markers.union(added_tokens(tokenizer, special_only=True)), key=len, reverse=True)
        self._reserved = re.compile("|".join(map(re.escape, reserved)) or r"(?!)")
        missing = sorted(template.markers.difference(added_tokens(tokenizer)))
        self.description = f"chat template {template.name}"
        if missing:
            self.description += f" ({' '.join(missing)} encoded as text, for they are no tokens of the tokenizer)"
        self._tokenizer = tokenizer
        tokenizer.encode_special_tokens = False

    def encode(self, records: list[Any]) -> list[EncodedDocument | Refused]:
        rendered = [self._rendered(record) for record in records]
        texts = [each[0] for each in rendered if not isinstance(each, Refused)]
        encodings = iter(self._tokenizer.encode_batch(texts, add_special_tokens=False))
        return [each if isinstance(each, Refused) else self._document(next(encodings), each[1]) for each in rendered]

    def save(self, folder: str | os.PathLike[str]) -> None:
        write_atomically(Path(folder, self.file_name), self._content)

    def _rendered(self, record: Any) -> tuple[str, list[tuple[int, int]]] | Refused:
        messages = read_conversation(record, self._key)
        if isinstance(messages, Refused):
            return messages
        for number, message in enumerate(messages, 1):
            forged = self._reserved.search(message["content"])
            if forged:
                return Refused("has a special token in its content", f"{forged[0]!r} in message {number}")
            if not is_unicode(message["content"]):
                return Refused("holds half a surrogate pair", f"message {number}")
        try:
            text, answers = self._template.render(messages)
        except ConversationError as error:
            return Refused(error.reason, error.details)
        if not is_unicode(text):
            return Refused("gets half a surrogate pair from the chat template")
        return text, answers

    def _document(self, encoding: Encoding, characters: Sequence[tuple[int, int]]) -> EncodedDocument | Refused:
        end = [] if self.eod_id is None else [self.eod_id]
        tokens = np.array(encoding.ids + end, dtype=np.uint32)
        begins = np.array([begin for begin, _ in encoding.offsets], dtype=np.int64)
        spans = np.searchsorted(begins, np.array(characters, dtype=np.int64).reshape(-1, 2))
        length = len(tokens)
        if self._max_tokens is not None and length > self._max_tokens:
            if self._overlong == "error":
                raise CorpusError(
                    f"a conversation has {length} tokens, more than --max-tokens {self._max_tokens}; raise it, "
                    "or have such conversations dropped or truncated"
                )
            if self._overlong == "drop":
                return Refused(f"is longer than {self._max_tokens} tokens", length=length)
            if self._overlong == "truncate":
                tokens, spans = tokens[: self._max_tokens], np.minimum(spans, self._max_tokens)
        spans = spans[spans[:, 0] < spans[:, 1]]
        if not len(spans):
            return Refused("has no token that the assistant says", length=length)
        return EncodedDocument(tokens, spans, length)
