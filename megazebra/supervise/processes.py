"""A launcher and whatever it starts, watched and ended as one. Linux: reads /proc."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

_POLL_S = 0.1


class Job:
    """A command in a session of its own, which its ranks share: they are found even when the launcher is gone."""

    def __init__(self, command: Sequence[str]) -> None:
        self._launcher = subprocess.Popen(command, start_new_session=True)

    def exit_code(self) -> int | None:
        """Of the launcher, whose ranks may go on; None while it runs. A signal's number is negative."""
        return self._launcher.poll()

    def ask_to_stop(self) -> None:
        """A run that hears of it makes its step, saves and ends."""
        pid = next(self._ranks(), self._launcher.pid)  # one rank tells the others; launchers would just kill them
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGUSR1)

    def end(self, patience_s: float) -> int:
        """Wait until all processes have ended, and kill those that have not after `patience_s`. Returns how many."""
        deadline = time.monotonic() + patience_s
        while (left := list(self._members())) and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)  # reaches stopped ones too
        while list(self._members()):
            time.sleep(_POLL_S)
        self._launcher.wait()
        return len(left)

    def _ranks(self) -> Iterator[int]:
        """Processes that a launcher gave a rank, the lowest first; a rank alone is the launcher itself."""
        found = []
        for pid in self._members():
            with suppress(OSError, StopIteration):
                environment = (Path("/proc") / str(pid) / "environ").read_bytes().split(b"\0")
                found.append((int(next(entry for entry in environment if entry.startswith(b"RANK="))[5:]), pid))
        return (pid for _, pid in sorted(found))

    def _members(self) -> Iterator[int]:
        """Processes of the session that have not ended."""
        self._launcher.poll()  # so that it is no zombie
        for folder in Path("/proc").iterdir():
            if not folder.name.isdigit():
                continue
            with suppress(OSError):  # it has ended meanwhile
                # After the name, which may contain anything: state, parent, group, session.
                state, _, _, session = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
                if int(session) == self._launcher.pid and state not in "ZX":
                    yield int(folder.name)
