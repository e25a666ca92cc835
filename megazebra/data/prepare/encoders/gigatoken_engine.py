"""gigatoken, a faster encoder for a Hugging Face tokenizer, held against `tokenizers` as it goes."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megazebra.data.errors import CorpusError
from megazebra.data.prepare.encoders.engines import Engine

# Compared are beginnings of texts: of the first batch's first texts, then of one text of every batch.
FIRST_TEXTS = 256
COMPARED_CHARACTERS = 4096


class GigatokenError(CorpusError):
    """gigatoken is not installed, can't load the tokenizer, or gives other tokens."""


class GigatokenEngine:
    """Tokens by gigatoken, no special token recognized in texts.

    content: of tokenizer.json. end: appended to every text. The tokenizer's added tokens, and a sample of the texts
    it is given, are encoded with `reference` too. Raises GigatokenError at the first difference, whenever it comes.
    """

    description = "gigatoken, its tokens compared with those of tokenizers on a sample of every batch"

    def __init__(self, content: bytes, end: int | None, *, reference: Engine, threads: int | None) -> None:
        try:
            import gigatoken
        except ImportError as error:
            raise GigatokenError(f"gigatoken is not installed ({error}); install megazebra[gigatoken]") from error
        fields: dict[str, Any] = json.loads(content)
        try:
            self._gigatoken = gigatoken.Tokenizer.from_json(_without_special_tokens(fields))
        except Exception as error:  # whatever the library cannot read
            reason = str(error).partition("\n")[0]  # a location in its source follows
            raise GigatokenError(f"gigatoken cannot load this tokenizer ({reason}); use --engine tokenizers") from error
        self._end = end
        self._reference = reference
        self._parallel = None if threads is None else threads > 1
        self._batches = 0
        added = [token["content"] for token in fields["added_tokens"]]
        self._compare(["", *(f"a {token}b{token} \n {token}" for token in added)])

    def __call__(self, texts: list[str]) -> list[NDArray]:
        if texts:
            compared = texts[:FIRST_TEXTS] if self._batches == 0 else [texts[self._batches % len(texts)]]
            self._compare([text[:COMPARED_CHARACTERS] for text in compared])
            self._batches += 1
        return self._encode(texts)

    def _encode(self, texts: list[str]) -> list[NDArray]:
        layout = self._gigatoken.encode_batch(texts, parallel=self._parallel).layout
        ids, ends = np.asarray(layout.content.data), np.asarray(layout.offsets.data)[1:]
        if self._end is not None:
            ids = np.insert(ids, ends, self._end)
            ends = ends + np.arange(1, len(ends) + 1)
        return np.split(ids, ends[:-1]) if texts else []

    def _compare(self, texts: list[str]) -> None:
        for text, ours, theirs in zip(texts, self._encode(texts), self._reference(texts), strict=True):
            if not np.array_equal(ours, theirs):
                common = min(len(ours), len(theirs))
                differs = np.flatnonzero(ours[:common] != theirs[:common])
                at = int(differs[0]) if differs.size else common
                raise GigatokenError(
                    f"gigatoken encodes {text[:80]!r}... otherwise than tokenizers: from token {at} on "
                    f"{ours[at : at + 5].tolist()}, not {theirs[at : at + 5].tolist()}; use --engine tokenizers"
                )


def _without_special_tokens(content: dict[str, Any]) -> str:
    """The tokenizer.json that makes gigatoken read special tokens in texts as text, and add none."""
    added = [token for token in content["added_tokens"] if not token["special"]]
    return json.dumps({**content, "added_tokens": added, "post_processor": None})
