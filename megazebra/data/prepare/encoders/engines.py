"""What turns texts into token ids: a call for a batch of texts, one array of ids with EOD for each."""

from __future__ import annotations

from array import array
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from megazebra.data.errors import CorpusError
from megazebra.data.prepare.encoders.tokenizer import load_sentencepiece


class Engine(Protocol):
    """Texts to one integer array each, in order, EOD appended where there is one. Texts have to be valid Unicode."""

    @property
    def description(self) -> str: ...

    def __call__(self, texts: list[str]) -> list[NDArray]: ...


class HuggingFaceEngine:
    """The `tokenizers` library."""

    description = "tokenizers"

    def __init__(self, tokenizer: Tokenizer, end: int | None) -> None:
        self._tokenizer = tokenizer
        self._end = [] if end is None else [end]

    def __call__(self, texts: list[str]) -> list[NDArray]:
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.frombuffer(self._ids(encoding), dtype=np.uintc) for encoding in encodings]

    def _ids(self, encoding: Any) -> array:
        ids = array("I", encoding.ids)  # the cheapest way from a list of int to a buffer
        ids.extend(self._end)
        return ids


class ByteEngine:
    """UTF-8: ids 0 to 255 are the bytes."""

    description = "bytes"

    def __init__(self, end: int | None) -> None:
        self._end = np.array([] if end is None else [end], dtype=np.uint16)

    def __call__(self, texts: list[str]) -> list[NDArray]:
        return [np.append(np.frombuffer(text.encode(), dtype=np.uint8), self._end) for text in texts]


class SentencePieceEngine:
    """A sentencepiece model with its own normalization, without BOS.

    Raises CorpusError where the library is not installed, the file is no model, or `eod` is none of its pieces.
    """

    description = "sentencepiece"

    def __init__(self, path: Path, *, threads: int | None) -> None:
        self._model = load_sentencepiece(path)
        self._threads = threads or -1  # one per core
        self._end: list[int] = []
        self.vocab_size: int = self._model.vocab_size()

    def end_documents_with(self, token: str | None) -> int:
        """Append `token`, by default the model's end of sentence; returns its id."""
        found = self._model.eos_id() if token is None else self._model.piece_to_id(token)
        if found < 0 or (token is not None and self._model.id_to_piece(found) != token):
            raise CorpusError(
                f"the sentencepiece model has no {f'piece {token!r}' if token else 'end of sentence'} to end "
                "documents with; name one of its pieces with --eod, or --eod none"
            )
        self._end = [found]
        return int(found)

    def __call__(self, texts: list[str]) -> list[NDArray]:
        batch = self._model.encode(texts, out_type=int, num_threads=self._threads)
        return [np.array(ids + self._end, dtype=np.uint32) for ids in batch]
