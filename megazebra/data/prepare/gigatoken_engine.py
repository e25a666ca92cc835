"""gigatoken, a faster encoder for a Hugging Face tokenizer, held against `tokenizers` as it goes."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from megazebra.data.errors import CorpusError
from megazebra.data.prepare.engines import Engine
from megazebra.data.prepare.tokenizer import added_tokens

# Compared are beginnings of texts: of the first batch's first texts, then of one text of every batch.
FIRST_TEXTS = 256
COMPARED_CHARACTERS = 4096


class GigatokenError(CorpusError):
    """gigatoken is not installed, can't load the tokenizer, or gives other tokens."""


class GigatokenEngine:
    """Tokens of `tokenizer` by gigatoken, no special token recognized in texts.

    The tokenizer's added tokens, and a sample of the texts it is given, are encoded with `reference` too.
    Raises GigatokenError at the first difference.
    """

    description = "gigatoken, its tokens compared with those of tokenizers on a sample of every batch"

    def __init__(self, tokenizer: Tokenizer, end: int | None, *, reference: Engine, threads: int | None) -> None:
        try:
            import gigatoken
        except ImportError as error:
            raise GigatokenError(f"gigatoken is not installed ({error}); install megazebra[gigatoken]") from error
        try:
            self._gigatoken = gigatoken.Tokenizer.from_json(_without_special_tokens(tokenizer))
        except Exception as error:  # whatever the library cannot read
            reason = str(error).partition("\n")[0]  # a location in its source follows
            raise GigatokenError(f"gigatoken cannot load this tokenizer ({reason}); use --engine tokenizers") from error
        self._end = end
        self._reference = reference
        self._parallel = None if threads is None else threads > 1
        self._batches = 0
        self._compare(["", *(f"a {token}b{token} \n {token}" for token in added_tokens(tokenizer))])

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


class AutomaticEngine:
    """gigatoken where it is fit for the tokenizer and the first batch, else `reference`.

    A difference in a later batch is an error: what was encoded before may have had others, unseen.
    """

    def __init__(self, tokenizer: Tokenizer, end: int | None, *, reference: Engine, threads: int | None) -> None:
        self._reference = reference
        self._engine: Engine = reference
        self._settled = False
        self._why = ""
        try:
            self._engine = GigatokenEngine(tokenizer, end, reference=reference, threads=threads)
        except GigatokenError as error:
            self._fall_back(error)

    @property
    def description(self) -> str:
        return self._engine.description + self._why

    def __call__(self, texts: list[str]) -> list[NDArray]:
        try:
            encoded = self._engine(texts)
        except GigatokenError as error:
            if self._settled:
                raise
            self._fall_back(error)
            encoded = self._engine(texts)
        self._settled = self._settled or bool(texts)
        return encoded

    def _fall_back(self, error: GigatokenError) -> None:
        self._engine = self._reference
        self._why = f" ({error})"


def _without_special_tokens(tokenizer: Tokenizer) -> str:
    """The tokenizer.json that makes gigatoken read special tokens in texts as text, and add none."""
    content: dict[str, Any] = json.loads(tokenizer.to_str())
    added = [token for token in content["added_tokens"] if not token["special"]]
    return json.dumps({**content, "added_tokens": added, "post_processor": None})
