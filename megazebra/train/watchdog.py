"""A run that makes no progress any more: where every rank is, and an end to it.

Collectives are what hangs then, so ranks tell each other through files in the run folder's `stacks`, which all of them
see: rank_N.txt has the Python stacks of rank N, summary.txt says in a line per place which ranks are there.
"""

from __future__ import annotations

import faulthandler
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from megazebra.durable import write_atomically
from megazebra.launch import HANG_EXIT_CODE

# Reading and writing a checkpoint makes no step for long, and may.
FILES_PATIENCE = 5.0
FOLDER = "stacks"
SUMMARY = "summary.txt"

_PACKAGE = Path(__file__).parents[1]
_STANDARD_LIBRARY = Path(os.__file__).parent
_STANDARD_ERROR = 2
_LONGEST_POLL_S = 10.0
_LONGEST_COLLECTION_S = 60.0


class Phase(NamedTuple):
    name: str
    began: float
    patience: float


class Watchdog:
    """Ends this process with HANG_EXIT_CODE when a phase takes too long, on this rank or on another.

    Ranks that hear of it write their stacks; the lowest of them waits until all have or can't, says where they are, and
    all end: some 1.3 times `timeout_s` after the last progress. A rank whose interpreter is blocked, so that no thread
    of Python's runs, ends with exit code 1 and its stacks on standard error.
    """

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank = rank
        self.world_size = world_size
        self._thread: threading.Thread | None = None
        self._closed = threading.Event()
        self.phase("start")

    def watch(self, run_dir: Path, timeout_s: float) -> None:
        """From now on no phase may take longer than `timeout_s` (seconds; 0: any may)."""
        self.close()
        self.phase("start", patience=FILES_PATIENCE)
        if not timeout_s:
            return
        self._folder = run_dir / FOLDER
        self._timeout_s = timeout_s
        self._poll_s = min(timeout_s / 20, _LONGEST_POLL_S)
        self._collection_s = min(timeout_s / 8, _LONGEST_COLLECTION_S) + 2 * self._poll_s
        self._old = self._files()
        self._closed.clear()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._thread.start()

    def phase(self, name: str, *, patience: float = 1.0) -> None:
        """This rank has made progress and begins something that may take `patience` times the usual limit."""
        self._phase = Phase(name, time.monotonic(), patience)

    def close(self) -> None:
        """Watch no longer."""
        if self._thread is not None:
            self._closed.set()
            self._thread.join()
            self._thread = None
            faulthandler.cancel_dump_traceback_later()

    def _run(self) -> None:
        while not self._closed.wait(self._poll_s):
            # Does what this thread can't when something holds the interpreter: it needs none.
            faulthandler.dump_traceback_later(2 * self._timeout_s + 10, exit=True, file=_STANDARD_ERROR)
            idle_s = time.monotonic() - self._phase.began
            if idle_s > self._timeout_s * self._phase.patience or self._new_ranks():
                self._end(idle_s)

    def _end(self, idle_s: float) -> None:
        lines = [f"rank {self.rank} on {socket.gethostname()}, pid {os.getpid()}: {self._phase.name}", _own_place()]
        head = [*lines, f"no progress for {idle_s:.1f} s, at {time.strftime('%Y-%m-%d %H:%M:%S')}"]
        with suppress(OSError):  # a disk that hangs or is gone: this rank ends nevertheless
            self._folder.mkdir(parents=True, exist_ok=True)
            write_atomically(self._folder / _file_of(self.rank), "\n".join([*head, *_stacks(), ""]).encode())
        deadline = time.monotonic() + self._collection_s
        while len(self._new_ranks()) < self.world_size and time.monotonic() < deadline:
            time.sleep(0.1)
        known = self._new_ranks()
        if not known or self.rank == known[0]:
            self._report(known, lines)
        else:  # launchers end all ranks when the first is gone: the summary comes first
            while SUMMARY not in self._new() and time.monotonic() < deadline + self._collection_s:
                time.sleep(0.1)
        os._exit(HANG_EXIT_CODE)

    def _report(self, ranks: Sequence[int], own: list[str]) -> None:
        where = {self.rank: own}
        for rank in ranks:
            with suppress(OSError):
                where[rank] = (self._folder / _file_of(rank)).read_text().splitlines()[:2]
        text = "\n".join(summary(where, self.world_size, self._folder))
        print(text, file=sys.stderr, flush=True)
        with suppress(OSError):
            write_atomically(self._folder / SUMMARY, f"{text}\n".encode())

    def _files(self) -> dict[str, tuple[int, int]]:
        """What the folder holds, each file with what changes when it is replaced."""
        try:
            found = [(entry.name, entry.stat()) for entry in os.scandir(self._folder)]
        except OSError:
            return {}
        return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in found}

    def _new(self) -> set[str]:
        """Files that were written since the start: those of an earlier hang stay for whoever looks into it."""
        return {name for name, state in self._files().items() if self._old.get(name) != state}

    def _new_ranks(self) -> list[int]:
        new = self._new()
        return [rank for rank in range(self.world_size) if _file_of(rank) in new] if new else []


def summary(where: dict[int, list[str]], world_size: int, folder: Path) -> Iterator[str]:
    """Sentences on which ranks are where; `where` has for every rank that answered 'who: phase' and its place."""
    yield f"the run hangs and is ended; Python stacks are in {folder}"
    groups: dict[tuple[str, str], list[int]] = {}
    for rank, (who, place) in sorted(where.items()):
        groups.setdefault((who.partition(": ")[2], place), []).append(rank)
    for (phase, place), ranks in sorted(groups.items(), key=lambda group: -len(group[1])):
        verb = "is" if len(ranks) == 1 else "are"
        yield f"  {ranks_in_words(ranks)} {verb} in {place} [{phase}]"
    silent = [rank for rank in range(world_size) if rank not in where]
    if silent:
        verb = "does" if len(silent) == 1 else "do"
        yield f"  {ranks_in_words(silent)} {verb} not answer: stopped, or gone with the host"


def ranks_in_words(ranks: Sequence[int]) -> str:
    """[0, 1, 2, 5] as 'ranks 0-2, 5'."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    words = (str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(words)}"


def place(frame: FrameType | None) -> str | None:
    """What a thread does, by the innermost of its frames that is ours; None where none is.

    'all_reduce (loss)' for a collective, else the function with its file and line, and what it has called outside
    (locks and queues of the standard library say nothing).
    """
    while frame is not None and _is_standard(frame):
        frame = frame.f_back
    innermost = frame
    while frame is not None and not Path(frame.f_code.co_filename).is_relative_to(_PACKAGE):
        frame = frame.f_back
    if frame is None or innermost is None:
        return None
    name, known = frame.f_code.co_name, frame.f_locals
    if frame.f_globals["__name__"].startswith("megazebra.parallel.") and "group" in known:
        return f"{name} ({known.get('label') or known['group'].name})"
    if name == "counted" and "kind" in known:  # DeepSpeed's own, see train/engine.py
        return f"{known['kind']} (zero)"
    return _line(frame) if innermost is frame else f"{_line(frame)}, which is in {_line(innermost)}"


def _is_standard(frame: FrameType) -> bool:
    path = Path(frame.f_code.co_filename)
    return path.is_relative_to(_STANDARD_LIBRARY) and "site-packages" not in path.parts


def _line(frame: FrameType) -> str:
    path = Path(frame.f_code.co_filename)
    shown = path.relative_to(_PACKAGE.parent) if path.is_relative_to(_PACKAGE) else Path(*path.parts[-2:])
    return f"{frame.f_code.co_name} ({shown}:{frame.f_lineno})"


def _own_place() -> str:
    """That of the main thread, and of others that are at work: the main thread may wait for one of them."""
    frames = sys._current_frames()
    main = place(frames.get(threading.main_thread().ident or 0)) or "no code of ours"
    others = [
        f"{thread.name} in {where}"
        for thread in threading.enumerate()
        if thread not in (threading.main_thread(), threading.current_thread())
        and (where := place(frames.get(thread.ident or 0)))
    ]
    return "; ".join([main, *others])


def _stacks() -> Iterator[str]:
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    for ident, frame in sys._current_frames().items():
        if ident != threading.get_ident():
            yield f"\nThread {names.get(ident, ident)}:"
            yield "".join(traceback.format_stack(frame)).rstrip()


def _file_of(rank: int) -> str:
    return f"rank_{rank}.txt"
