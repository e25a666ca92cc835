"""The error of everything under data/."""

from __future__ import annotations


class CorpusError(ValueError):
    """A corpus that is missing, damaged, stale or unfit: the message says what, where, and how to mend it."""
