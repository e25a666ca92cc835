"""What was seen against what should be, and the sentences that say so.

Legend: B rows, S tokens of a row.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from megazebra.models.receptive_field.scenes import Documents, Place

LEAK, LOST = "LEAK", "LOST"


@dataclass(frozen=True)
class Seen:
    """What one probe showed of every position.

    some_BS: bool, there is an influence. heads_BS: int64, in how many of `heads` heads it shows.
    """

    some_BS: NDArray[np.bool_]
    heads_BS: NDArray[np.int64]
    heads: int


@dataclass(frozen=True)
class Finding:
    """A query and a token between which something is wrong.

    layers: which ones, as tables name them. test: what showed it. verdict: LEAK or LOST. crossed: in a leak, the limit
    that did not hold. share: how many heads, where not all.
    """

    layers: str
    test: str
    verdict: str
    crossed: str
    query: Place
    token: Place
    window: int | None
    share: str

    def __str__(self) -> str:
        query, token = self.query, self.token
        rows = query.row != token.row
        reader = f"query {query.position}" + (f" of row {query.row}" if rows else "")
        if self.verdict == LOST:
            home = "of its document" if self.window is None else f"in its window of {self.window}"
            return f"{reader} does not see token {token.position} {home}"
        distance = query.position - token.position
        where = {
            "row": f" of row {token.row}",
            "future": ", which comes after it",
            "document": " of another document",
            "window": f", which is {distance} away (window {self.window})",
        }[self.crossed]
        return f"{reader} sees token {token.position}{where}"


class Judge:
    """Compares what layers of one kind show with what documents and window allow."""

    def __init__(self, layers: str, window: int | None) -> None:
        self.layers, self.window = layers, window

    def outputs(self, token: Place, seen: Seen, documents: Documents, test: str = "outputs") -> list[Finding]:
        """seen: of the queries, which see the token."""
        wrong = _wrong(seen, documents.readers(token, self.window))
        return [self._finding(test, documents, query, token, *case) for query, *case in wrong]

    def gradients(self, query: Place, seen: Seen, documents: Documents) -> list[Finding]:
        """seen: of the tokens, which ones the query sees."""
        wrong = _wrong(seen, documents.keys(query, self.window))
        return [self._finding("gradients", documents, query, token, *case) for token, *case in wrong]

    def _finding(
        self, test: str, documents: Documents, query: Place, token: Place, verdict: str, share: str
    ) -> Finding:
        crossed = ""
        if verdict == LEAK:
            crossed = "window"
            if query.row != token.row:
                crossed = "row"
            elif query.position < token.position:
                crossed = "future"
            elif documents.start_BS[query] != documents.start_BS[token]:
                crossed = "document"
        return Finding(self.layers, test, verdict, crossed, query, token, self.window, share)


def _wrong(seen: Seen, expected_BS: NDArray[np.bool_]) -> Iterator[tuple[Place, str, str]]:
    lost_BS = expected_BS & (seen.heads_BS < seen.heads)
    leak_BS = seen.some_BS & ~expected_BS
    for row, position in np.argwhere(lost_BS | leak_BS).tolist():
        lost, heads = bool(lost_BS[row, position]), int(seen.heads_BS[row, position])
        concerned = seen.heads - heads if lost else heads
        share = f"in {concerned} of {seen.heads} heads" if 0 < concerned < seen.heads else ""
        yield Place(row, position), LOST if lost else LEAK, share


def sentences(findings: Iterable[Finding]) -> Iterator[str]:
    """One for every way in which layers of a kind fail: its first case, and how many there are."""

    def way(finding: Finding) -> tuple[str, ...]:
        return finding.layers, finding.test, finding.verdict, finding.crossed

    for (layers, test, verdict, _), group in groupby(sorted(findings, key=way), key=way):
        first, *more = group
        pairs = f"{1 + len(more):,} such pairs" if more else ""
        about = ", ".join(part for part in (layers, test, first.share, pairs) if part)
        yield f"{verdict}: {first} ({about})"
