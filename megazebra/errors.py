"""Errors that are messages to the user, not defects of the program; and those that may be gone at the next start."""

from __future__ import annotations

import errno

# What a file server that does not answer, or a disk that is failing, gives.
_PASSING = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EREMOTEIO, errno.EHOSTDOWN}


class UserError(Exception):
    """Something the user can mend; the message says what, where and how. `ValueError`s of ours are taken alike."""


class PassingError(Exception):
    """What `passes` says of a cause; it ends a run as a failure, so that it is started again."""


def passes(error: BaseException) -> bool:
    """Whether nobody has to mend anything before a run is started again: the file server did not answer, or memory was
    short."""
    return isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno in _PASSING)
