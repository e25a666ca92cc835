"""The rows of a metrics.jsonl that somebody else is writing."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, BinaryIO

Row = dict[str, Any]


class Follower:
    """Reads on where it stopped. A line without an end is read again when it has one; what is no row is left out.

    damaged: lines left out.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.damaged = 0
        self._file: BinaryIO | None = None
        self._cut_line = b""

    def poll(self) -> tuple[list[Row], bool]:
        """The rows since the last call, and whether they are the first of another file: a resumed run replaces it."""
        another = self._reopen()
        if self._file is None:
            return [], another
        *lines, self._cut_line = (self._cut_line + self._file.read()).split(b"\n")
        rows = []
        for line in filter(None, lines):
            row = _row(line)
            if row is None:
                self.damaged += 1
            else:
                rows.append(row)
        return rows, another

    def written_at(self) -> float | None:
        """When the file grew last, Unix time; None where there is none."""
        return None if self._file is None else os.fstat(self._file.fileno()).st_mtime

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file = None

    def _reopen(self) -> bool:
        """Open what is at the path now; whether that is not what was open."""
        try:
            now = self.path.stat()
        except FileNotFoundError:  # not yet there, or being replaced: what was read stands until there is another
            return False
        # The old file is held open, so that another one can't get its number.
        if self._file is not None:
            known = os.fstat(self._file.fileno())
            if os.path.samestat(known, now) and now.st_size >= self._file.tell():
                return False
        self.close()
        self._file = self.path.open("rb")
        self._cut_line, self.damaged = b"", 0
        return True


def _row(line: bytes) -> Row | None:
    """A row has a kind and a step; anything else is damage."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):  # nested too deeply for the reader
        return None
    if not isinstance(row, dict) or not isinstance(row.get("kind"), str):
        return None
    step = row.get("step")
    return row if isinstance(step, int) and 0 <= step < 2**63 else None
