"""A launcher and whatever it starts, watched and ended as one. Linux: reads /proc."""

from __future__ import annotations

import os
import signal
import subprocess
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

from megazebra.errors import UserError

_POLL_S = 0.1
_LONGEST_DEATH_S = 60.0


class Job:
    """A command and what it starts. All of it has a variable in its environment, so that it is found even when the
    launcher is gone, and in the sessions of their own that torchrun gives its ranks."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        cwd: Path | None = None,
        variables: Mapping[str, str] | None = None,
        output: IO[str] | None = None,
    ) -> None:
        """variables: of the environment, where this process has none of that name. output: takes what all of them
        write; None: it goes where this process's own does."""
        mark = uuid.uuid4().hex
        self._mark = f"MEGAZEBRA_JOB={mark}".encode()
        environment = {**(variables or {}), **os.environ, "MEGAZEBRA_JOB": mark}
        self._launcher = subprocess.Popen(
            command, cwd=cwd, env=environment, stdout=output, stderr=output, start_new_session=True
        )

    def exit_code(self) -> int | None:
        """Of the launcher, whose ranks may go on; None while it runs. A signal's number is negative."""
        return self._launcher.poll()

    def ask_to_stop(self) -> None:
        """A run that hears of it makes its step, saves and ends."""
        pid = next(self._ranks(), self._launcher.pid)  # one rank tells the others; launchers would just kill them
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGUSR1)

    def end(self, patience_s: float) -> int:
        """Wait until all processes have ended, and kill those that have not after `patience_s`. Returns how many.

        Raises UserError when some do not even end then.
        """
        killed: set[int] = set()
        patient_until = time.monotonic() + patience_s
        while left := list(self._members()):
            late_s = time.monotonic() - patient_until
            if late_s > _LONGEST_DEATH_S:
                pids = ", ".join(map(str, left))
                raise UserError(
                    f"the processes {pids} do not end, not even by SIGKILL: a file system or a device hangs; mend "
                    "that, then start again"
                )
            if late_s >= 0:
                for pid in left:
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)  # reaches stopped ones too; again, since they may start others
                killed |= set(left)
            time.sleep(_POLL_S)
        self._launcher.wait()
        return len(killed)

    def _ranks(self) -> Iterator[int]:
        """Processes that a launcher gave a rank, the lowest first; a rank alone is the launcher itself."""
        found = []
        for pid in self._members():
            with suppress(OSError, StopIteration):
                environment = _environment(pid)
                found.append((int(next(entry for entry in environment if entry.startswith(b"RANK="))[5:]), pid))
        return (pid for _, pid in sorted(found))

    def _members(self) -> Iterator[int]:
        """Processes of the job that have not ended."""
        self._launcher.poll()  # so that it is no zombie
        for folder in Path("/proc").iterdir():
            if not folder.name.isdigit():
                continue
            with suppress(OSError):  # it has ended meanwhile
                # After the name, which may contain anything: state, parent, group, session.
                state, _, _, session = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
                of_job = int(session) == self._launcher.pid or self._mark in _environment(int(folder.name))
                if of_job and state not in "ZX":
                    yield int(folder.name)


def _environment(pid: int) -> list[bytes]:
    """NAME=value of a process when it was started. Raises OSError when it has ended or is another user's."""
    return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
