"""The progress bar of the tools that read and write many bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm


@contextmanager
def byte_bar(description: str, total: int) -> Iterator[Callable[[int], None]]:
    """On a terminal a bar of `total` bytes, gone at the end; calls of what it gives advance it by that many."""
    with tqdm(total=total, unit="B", unit_scale=True, desc=description, leave=False, disable=None) as bar:

        def advance(count: int) -> None:
            bar.update(count)

        yield advance
