"""Errors that are messages to the user, not defects of the program. Imports nothing."""

from __future__ import annotations


class UserError(Exception):
    """Something the user can mend; the message says what, where and how. `ValueError`s of ours are taken alike."""
