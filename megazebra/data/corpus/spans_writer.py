"""The `.spans` of a corpus that is being written."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megazebra.data.corpus.integers import as_integers
from megazebra.data.corpus.spans import DocumentSpans, pack_spans
from megazebra.data.errors import CorpusError
from megazebra.data.index.documents import end_to_end


class SpansWriter:
    """Collects the spans of documents as they come; memory: 8 bytes per document and 16 per span.

    prefix: of the corpus, for errors.
    """

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._counts = array("q")
        self._bounds = array("q")

    def add(self, spans: Sequence[ArrayLike], lengths: NDArray[np.int64]) -> None:
        """Spans, integers [k, 2] each, of documents of these lengths (tokens).

        Raises CorpusError for anything else, and where they don't fit their document.
        """
        if len(spans) != len(lengths):
            raise CorpusError(f"{self._prefix}: {len(spans)} lists of spans came with {len(lengths)} documents")
        pairs = [
            as_integers(each, (2,), f"{self._prefix}: spans of document {number}", "give a list of integer pairs")
            for number, each in enumerate(spans, len(self._counts))
        ]
        self.extend(DocumentSpans.collect(pairs), lengths)

    def extend(self, spans: DocumentSpans, lengths: NDArray[np.int64]) -> None:
        """The spans of documents of these lengths (tokens). Raises CorpusError where they don't fit them."""
        if fault := spans.fault(lengths):
            raise CorpusError(f"{self._prefix}: counted from document {len(self._counts)}, {fault}")
        self._counts.frombytes(np.diff(spans.firsts).tobytes())
        self._bounds.frombytes(spans.bounds.tobytes())

    def pack(self) -> bytes:
        """The bytes of the file."""
        firsts = end_to_end(np.array(self._counts, dtype=np.int64))
        return pack_spans(DocumentSpans(firsts, np.array(self._bounds, dtype=np.int64).reshape(-1, 2)))
