"""What a corpus consists of: documents and tokens by length, and what its files say of it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megazebra.data.corpus.indexed_corpus import Corpus
from megazebra.data.index.buckets import bucket_by_length
from megazebra.data.index.documents import end_to_end

PERCENTILES = (1, 10, 25, 50, 75, 90, 99)
# Documents looked at together, which bounds the memory.
PIECE = 2**20


@dataclass(frozen=True)
class LengthHistogram:
    """Documents by length, in buckets of powers of two.

    shortest, longest: int64 [B], the lengths that bucket b takes, both ends included: 0; 1; 2 to 3; 4 to 7; and so on.
    documents, tokens: int64 [B], how many there are in it. The last bucket is not empty.
    """

    shortest: NDArray[np.int64]
    longest: NDArray[np.int64]
    documents: NDArray[np.int64]
    tokens: NDArray[np.int64]


def length_histogram(lengths: NDArray[np.integer]) -> LengthHistogram:
    """lengths: int32 or int64 [documents], tokens; there has to be one."""
    bounds = 2 ** np.arange(int(lengths.max()).bit_length(), dtype=np.int64)
    documents = np.zeros(len(bounds) + 1, dtype=np.int64)
    tokens = np.zeros(len(bounds) + 1, dtype=np.int64)
    for first in range(0, len(lengths), PIECE):
        piece = lengths[first : first + PIECE]
        buckets = bucket_by_length(piece, bounds.tolist())
        documents += np.diff(buckets.starts)
        tokens += np.diff(end_to_end(piece[buckets.documents])[buckets.starts])
    shortest = np.concatenate(([0], bounds))
    return LengthHistogram(shortest, np.concatenate((bounds, bounds[-1:] * 2)) - 1, documents, tokens)


def length_percentiles(lengths: NDArray[np.integer]) -> dict[int, int]:
    """For each of PERCENTILES the shortest length that many per cent of the documents don't exceed."""
    found = np.percentile(lengths, PERCENTILES, method="inverted_cdf")
    return dict(zip(PERCENTILES, found.tolist(), strict=True))


def describe(corpus: Corpus, histogram: LengthHistogram) -> dict[str, Any]:
    """All that can be said without reading tokens, for JSON; None where the sidecar would have said it."""
    lengths, meta = corpus.document_lengths, corpus.meta
    longest = int(lengths.argmax())
    return {
        "prefix": corpus.prefix,
        "documents": corpus.documents,
        "tokens": corpus.tokens,
        "bytes": os.path.getsize(f"{corpus.prefix}.bin"),
        "dtype": corpus.dtype.name,
        "sidecar": meta is not None,
        "vocab_size": meta.vocab_size if meta else None,
        "eod_id": meta.eod_id if meta else None,
        "tokenizer": meta.tokenizer if meta else None,
        "inputs": meta.inputs if meta else None,
        "unigram_entropy": meta.unigram_entropy if meta else None,
        "unigram_cross_entropy": meta.unigram_cross_entropy if meta else None,
        "assistant_tokens": corpus.document_spans.tokens if corpus.document_spans else None,
        "fingerprint": corpus.fingerprint,
        "mean_length": corpus.tokens / corpus.documents,
        "longest_length": int(lengths[longest]),
        "longest_document": longest,
        "length_percentiles": length_percentiles(lengths),
        "length_histogram": [
            {"shortest": low, "longest": high, "documents": documents, "tokens": tokens}
            for low, high, documents, tokens in zip(
                histogram.shortest.tolist(),
                histogram.longest.tolist(),
                histogram.documents.tolist(),
                histogram.tokens.tolist(),
                strict=True,
            )
        ],
    }
