"""Start a run again until it has made its last step, or until that is hopeless."""

from __future__ import annotations

import json
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

from megazebra.config.stages import Stage
from megazebra.errors import UserError
from megazebra.launch import HANG_EXIT_CODE, INTERRUPTED_EXIT_CODE, REQUEUE_EXIT_CODE, USER_ERROR_EXIT_CODE
from megazebra.supervise.processes import Job
from megazebra.supervise.progress import file_identity, largest_world, made_step, saved_step

RECORD = "supervisor.jsonl"

_MEANINGS = {
    USER_ERROR_EXIT_CODE: "an error that starting again does not mend",
    INTERRUPTED_EXIT_CODE: "interrupted",
    REQUEUE_EXIT_CODE: "stopped on request, and saved",
    HANG_EXIT_CODE: "a hang, see the run folder's stacks",
}
_POLL_S = 0.2
_LAST_WORDS_S = 10.0  # for ranks whose launcher is gone to say why they end
_LONGEST_PAUSE_S = 300.0
_LONGEST_LOOK_S = 60.0  # a driver that hangs keeps nvidia-smi for ever


@dataclass(frozen=True)
class Policy:
    """ranks: how many are wanted. min_ranks: fewer than that are not worth it. max_restarts: after failures.
    max_fruitless: failures in a row without a newer checkpoint. pause_s: before the next start; doubles with every
    fruitless one. available: a shell command that prints how many ranks can run now; None: as many as are wanted.
    look_again_s: how often that is asked while too few run. stop_s: how long a run may take to save and stop.
    """

    ranks: int
    min_ranks: int = 1
    max_restarts: int = 10
    max_fruitless: int = 3
    pause_s: float = 5.0
    available: str | None = None
    look_again_s: float = 60.0
    stop_s: float = 300.0


@dataclass(frozen=True)
class Attempt:
    """One start: saved_step is that of the newest checkpoint afterwards, made_step the last one in the metrics."""

    number: int
    ranks: int
    first_step: int
    saved_step: int
    made_step: int
    exit_code: int
    killed: int
    seconds: float

    def describe(self, last_step: int) -> str:
        code = self.exit_code
        if code == 0 and self.saved_step < last_step:
            meaning = "but the run is not complete: its launcher may have been killed"
        else:
            meaning = _MEANINGS.get(code, signal_name(code))
        text = f"ended with {code}{f', {meaning}' if meaning else ''} after {self.seconds:.0f} s; "
        text += f"step {self.made_step} was made, step {self.saved_step} of {last_step} is saved"
        return text + (f"; {self.killed} processes that were left are killed" if self.killed else "")


class Supervisor:
    """stages: of the run, whose folder is `run_dir`. launch: the launcher's command, with {ranks} and {port} in it.
    script: the training program and its arguments.

    Raises UserError when no number of ranks fits the layout.
    """

    def __init__(
        self, stages: Sequence[Stage], run_dir: Path, launch: str, script: Sequence[str], policy: Policy
    ) -> None:
        self.stages, self.run_dir, self.launch, self.script, self.policy = stages, run_dir, launch, script, policy
        self.last_step = stages[-1].last_step
        if largest_world(stages, policy.ranks, policy.min_ranks) is None:
            parallel, train = stages[0].config.parallel, stages[0].config.train
            raise UserError(
                f"no number of ranks from {policy.min_ranks} to {policy.ranks} fits parallel.tensor={parallel.tensor}, "
                f"parallel.context={parallel.context} and train.global_batch_size={train.global_batch_size}"
            )
        self._stop = threading.Event()

    def run(self) -> int:
        """Until the end. Returns the exit code: 0 for a complete run, else the last one of the run's (1 for a 0)."""
        for request in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
            if signal.getsignal(request) is not signal.SIG_IGN:  # as nohup has SIGHUP
                signal.signal(request, self._asked_to_stop)
        restarts = fruitless = 0
        number = 1
        while (ranks := self._ranks_to_start()) is not None:
            attempt, grows = self._attempt(number, ranks)
            self._record(attempt)
            code = attempt.exit_code
            if code == 0 and attempt.saved_step >= self.last_step:
                say(f"complete after {number} starts")
                return 0
            say(attempt.describe(self.last_step))
            if code in (USER_ERROR_EXIT_CODE, INTERRUPTED_EXIT_CODE):
                return code
            if self._stop.is_set() or (code == REQUEUE_EXIT_CODE and not grows):
                return REQUEUE_EXIT_CODE
            number += 1
            if grows and code == REQUEUE_EXIT_CODE:
                continue
            fruitless = 0 if attempt.saved_step > attempt.first_step else fruitless + 1
            if fruitless >= self.policy.max_fruitless:
                say(f"gives up: {fruitless} failures in a row without a newer checkpoint")
                return code or 1
            if restarts == self.policy.max_restarts:
                say(f"gives up: --max-restarts={restarts} are used up")
                return code or 1
            restarts += 1
            self._stop.wait(min(self.policy.pause_s * 2**fruitless, _LONGEST_PAUSE_S))
        return REQUEUE_EXIT_CODE

    def _attempt(self, number: int, ranks: int) -> tuple[Attempt, bool]:
        """Start the run and wait for its end. Also: whether it was asked to stop so that more ranks can go on."""
        first_step, started = saved_step(self.run_dir), time.monotonic()
        before = file_identity(self.run_dir)
        say(f"start {number}: {ranks} ranks, from step {first_step}")
        job = Job([*shlex.split(self.launch.format(ranks=ranks, port=free_port())), *self.script])
        try:
            code, grows = self._watch(
                job, ranks, lambda: file_identity(self.run_dir) != before and made_step(self.run_dir) > first_step
            )
        except KeyboardInterrupt:  # the terminal's signal does not reach a session of its own
            code, grows = INTERRUPTED_EXIT_CODE, False
            job.end(0)
        except BaseException:  # nothing may be left that nobody looks after
            job.end(0)
            raise
        killed = job.end(0 if self._stop.is_set() and code is None else _LAST_WORDS_S)
        made, saved = made_step(self.run_dir), saved_step(self.run_dir)
        code = -signal.SIGKILL if code is None else code
        return Attempt(number, ranks, first_step, saved, made, code, killed, time.monotonic() - started), grows

    def _watch(self, job: Job, ranks: int, makes_steps: Callable[[], bool]) -> tuple[int | None, bool]:
        """The launcher's exit code; None when it did not end in `stop_s` after it was asked to.

        makes_steps: whether this start has made one. Until then it is not asked to stop for more ranks.
        """
        asked_at, looked_at, grows = None, time.monotonic(), False
        while (code := job.exit_code()) is None:
            time.sleep(_POLL_S)
            now = time.monotonic()
            if asked_at is not None:
                if now - asked_at > self.policy.stop_s:
                    return None, grows
                continue
            if ranks < self.policy.ranks and now - looked_at > self.policy.look_again_s and makes_steps():
                looked_at = now
                more = self._more_ranks(ranks)
                grows = more is not None
                if grows:
                    say(f"{more} ranks can run now: the run stops and goes on with them")
            if self._stop.is_set() or grows:
                asked_at = now
                job.ask_to_stop()
        return code, grows

    def _ranks_to_start(self) -> int | None:
        """As many as can run, after waiting for the least; None when asked to stop meanwhile."""
        said = False
        while not self._stop.is_set():
            ranks = largest_world(self.stages, self._available(), self.policy.min_ranks)
            if ranks is not None:
                return ranks
            if not said:
                say(f"waits for {self.policy.min_ranks} ranks (--min-ranks): `{self.policy.available}` has fewer")
                said = True
            self._stop.wait(self.policy.look_again_s)
        return None

    def _more_ranks(self, ranks: int) -> int | None:
        """How many more than `ranks` can run now; None where that is not known: a run that goes well is left alone."""
        try:
            return largest_world(self.stages, self._available(), ranks + 1)
        except UserError as error:
            say(str(error))
            return None

    def _available(self) -> int:
        if self.policy.available is None:
            return self.policy.ranks
        try:
            done = subprocess.run(
                self.policy.available, shell=True, capture_output=True, text=True, timeout=_LONGEST_LOOK_S
            )
        except subprocess.TimeoutExpired:
            raise UserError(
                f"--available: `{self.policy.available}` gave no answer in {_LONGEST_LOOK_S:.0f} s"
            ) from None
        try:
            return min(int(done.stdout), self.policy.ranks)
        except ValueError:
            raise UserError(
                f"--available: `{self.policy.available}` printed {done.stdout + done.stderr!r}; it must print a number"
            ) from None

    def _asked_to_stop(self, number: int, frame: FrameType | None) -> None:
        self._stop.set()

    def _record(self, attempt: Attempt) -> None:
        # The run may have failed before it made its folder, or because the disk is full.
        with suppress(OSError), (self.run_dir / RECORD).open("a") as file:
            file.write(json.dumps(asdict(attempt)) + "\n")


def say(text: str) -> None:
    print(f"supervisor: {text}", file=sys.stderr, flush=True)


def signal_name(code: int) -> str:
    """Of a process that a signal ended: Python gives its negative number, shells and launchers 128 more or 256 less."""
    number = -code if code < 0 else code - 128 if 128 < code < 192 else 256 - code if code >= 192 else 0
    try:
        return signal.Signals(number).name
    except ValueError:
        return ""


def free_port() -> int:
    """A port for the ranks to meet at: that of the start before may be in use still."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
