"""Where to probe: documents that break around the ranks' boundaries, and the tokens where a mask goes wrong first.

Legend: B rows, S tokens of a row.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

MAX_PROBES = 16  # tokens, and as many queries, of one kind of layer


class Place(NamedTuple):
    row: int
    position: int


@dataclass(frozen=True)
class Documents:
    """lengths: those of every row's documents. start_BS: int64 [B, S], the first token of each token's document."""

    lengths: tuple[tuple[int, ...], ...]
    start_BS: NDArray[np.int64]

    @classmethod
    def cut(cls, cuts_of_rows: Iterable[Iterable[int]], seq_len: int) -> Documents:
        """Rows of seq_len tokens, cut before the tokens given for each row; cuts outside of it are left out."""
        lengths, starts = [], []
        for cuts in cuts_of_rows:
            edges = np.array([0, *sorted({cut for cut in cuts if 0 < cut < seq_len}), seq_len])
            lengths.append(tuple(np.diff(edges).tolist()))
            starts.append(np.repeat(edges[:-1], np.diff(edges)))
        return cls(tuple(lengths), np.stack(starts))

    def positions(self) -> NDArray[np.int64]:
        """[B, S], counted from 0 in every document."""
        return np.arange(self.start_BS.shape[1]) - self.start_BS

    def readers(self, token: Place, window: int | None) -> NDArray[np.bool_]:
        """Which queries should see the token: bool [B, S]."""
        queries = np.arange(self.start_BS.shape[1])
        seen_BS = np.zeros(self.start_BS.shape, np.bool_)
        seen_BS[token.row] = (self.start_BS[token.row] <= token.position) & (token.position <= queries)
        if window is not None:
            seen_BS[token.row] &= queries < token.position + window
        return seen_BS

    def keys(self, query: Place, window: int | None) -> NDArray[np.bool_]:
        """Which tokens the query should see: bool [B, S]."""
        first = int(self.start_BS[query])
        if window is not None:
            first = max(first, query.position - window + 1)
        seen_BS = np.zeros(self.start_BS.shape, np.bool_)
        seen_BS[query.row, first : query.position + 1] = True
        return seen_BS


@dataclass(frozen=True)
class Scene:
    """Documents, and where to look in them: tokens that are seen, and queries that see."""

    documents: Documents
    tokens: tuple[Place, ...]
    queries: tuple[Place, ...]


def scenes(*, rows: int, seq_len: int, unpadded: int, ranks: int, window: int | None, masked: bool) -> list[Scene]:
    """Packed sequences whose documents break in every way around the ranks' boundaries, and whole ones.

    seq_len: a multiple of `ranks`; unpadded: tokens of it that are no padding. window: of the layers to be probed.
    masked: documents don't see each other; else there are whole sequences only.
    """
    local_len = seq_len // ranks
    # A single rank has no boundary; its middle serves as well as any other place.
    seams = [rank * local_len for rank in range(1, ranks)] or [seq_len // 2]
    padding = [unpadded] if masked else []  # a document of its own, as in training
    packed = []
    packings = _packings(seams, max(1, min(window or seams[0], seams[0]) // 2)) if masked else []
    for number in range(len(packings)):
        of_rows = [packings[(number + row) % len(packings)] for row in range(rows)]
        documents = Documents.cut([[*packing.cuts, *padding] for packing in of_rows], seq_len)
        # Of the second row too: it has to keep to its own documents.
        tokens = [Place(0, token) for token in of_rows[0].tokens] + [Place(1, each.tokens[0]) for each in of_rows[1:2]]
        queries = [Place(0, query) for query in of_rows[0].queries]
        queries += [Place(1, each.queries[0]) for each in of_rows[1:2]]
        packed.append(Scene(documents, _inside(tokens, seq_len), _inside(queries, seq_len)))
    whole = Documents.cut([padding] * rows, seq_len)
    seen, seeing = (
        _inside((Place(rows - 1, position) for position in positions), seq_len)
        for positions in _in_whole_sequences(seams, seq_len, window)
    )
    left = MAX_PROBES - sum(len(scene.tokens) for scene in packed)
    return [Scene(whole, seen[:left], seeing[:left]), *packed]


class _Packing(NamedTuple):
    """Where documents begin, and what to probe: first the one by which a document that doesn't end shows."""

    cuts: list[int]
    tokens: list[int]
    queries: list[int]


def _packings(seams: Sequence[int], half_window: int) -> list[_Packing]:
    middle, last = seams[len(seams) // 2], seams[-1]
    inside = last - half_window
    return [
        # At every boundary; one token before it, which is a document of its own; one after.
        _Packing(list(seams), [middle - 1, middle], [middle, middle - 1]),
        _Packing([cut for seam in seams for cut in (seam - 1, seam)], [middle - 1, middle], [middle, middle - 1]),
        _Packing([seam + 1 for seam in seams], [middle, middle + 1], [middle + 1, middle]),
        # In the middle of windows that reach over a boundary, with a document to the left as long as can be.
        _Packing([inside], [inside - 1, inside], [inside, last]),
    ]


def _in_whole_sequences(seams: Sequence[int], seq_len: int, window: int | None) -> tuple[list[int], list[int]]:
    """Tokens to be seen and queries that see, those that tell most first."""
    middle = seams[len(seams) // 2]
    around = [middle - 1, middle]
    ends = [0, seq_len - 1]
    others = [position for seam in seams if seam != middle for position in (seam - 1, seam)]
    if window is None:
        return [*around, *ends, *others], [*around, *ends, *others]
    # The window's edges, across the boundary: the last token that nobody to the right sees, the first that one query
    # does; and the last query that sees anything to the left, the first that doesn't.
    return (
        [*around, middle - window, middle - window + 1, *ends, *others],
        [*around, middle + window - 2, middle + window - 1, *ends, *others],
    )


def _inside(places: Iterable[Place], seq_len: int) -> tuple[Place, ...]:
    return tuple(place for place in dict.fromkeys(places) if 0 <= place.position < seq_len)
