"""A folder for large files that is gone when a program ends, also when it is told to stop."""

from __future__ import annotations

import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType


@contextmanager
def scratch_folder(program: str, parent: str | None = None) -> Iterator[Path]:
    """A new folder in `parent` (None: the system's temporary folder), removed at the end, after an error, and when the
    process is interrupted or terminated. Only kill -9 leaves it: its name says what it is. Main thread only.
    """

    def stop(number: int, _: FrameType | None) -> None:
        sys.exit(128 + number)  # as a shell names it; an exception, so that the folder is removed

    before = signal.signal(signal.SIGTERM, stop)
    try:
        with tempfile.TemporaryDirectory(prefix=f"{program}_scratch_may_be_deleted_", dir=parent) as folder:
            yield Path(folder)
    finally:
        signal.signal(signal.SIGTERM, before)
