"""Faults of one rank at one step of a run, put into pretrain_zebra.py from outside.

Each function patches what it needs when it is called, in every rank's process before training is started; `when` names
the rank and the step, and that it happens once: a run that is started again is left alone.
"""

from __future__ import annotations

import os
import signal
import socket
import stat
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from support.nodes import CABLE, ip, move_to_own_node


@dataclass(frozen=True)
class When:
    """folder: where each rank notes the time of its fault. steps: which ones, counted from 1. ranks: None for all."""

    folder: Path
    steps: range
    ranks: tuple[int, ...] | None = None

    @property
    def mine(self) -> bool:
        return self.ranks is None or _rank() in self.ranks

    @property
    def _note(self) -> Path:
        return self.folder / f"fault_of_rank_{_rank()}"

    def happens(self, step: int) -> bool:
        """Whether it does now, which is noted. Not in steps that an earlier start has reached."""
        if not self.mine or step not in self.steps or step <= int(_read(self._note).partition(" ")[2] or 0):
            return False
        first = _read(self._note).partition(" ")[0] or repr(time.time())
        self._note.write_text(f"{first} {step}")
        return True


def fault_time(folder: Path) -> float:
    """When the first rank had its fault."""
    return min(float(path.read_text().partition(" ")[0]) for path in folder.glob("fault_of_rank_*"))


def kill(when: When) -> None:
    _before_step(when, lambda: os.kill(os.getpid(), signal.SIGKILL))


def stop(when: When) -> None:
    """As a debugger, a batch system or a broken device driver does."""
    _before_step(when, lambda: os.kill(os.getpid(), signal.SIGSTOP))


def kill_launcher(when: When) -> None:
    _before_step(when, lambda: os.kill(os.getppid(), signal.SIGKILL))


def terminate(when: When) -> None:
    _before_step(when, lambda: os.kill(os.getpid(), signal.SIGTERM))


def never_start(rank: int) -> None:
    if _rank() == rank:
        _wait_forever()


def wait_forever(when: When) -> None:
    _before_step(when, _wait_forever)


def read_forever(when: When) -> None:
    """The data thread waits for a file server that is gone."""
    from megazebra.data.loader import StepLoader

    original = StepLoader.next_step

    def next_step(self: StepLoader, consumed_samples: int) -> Any:
        if when.happens(consumed_samples // self.global_batch_size + 1):
            _wait_forever()
        return original(self, consumed_samples)

    StepLoader.next_step = next_step  # type: ignore[method-assign]


def write_forever(when: When) -> None:
    """A rank that waits where it would save a step."""
    from megazebra.checkpoint.manager import Checkpoints

    original = Checkpoints.save

    def save(self: Checkpoints, progress: Any) -> Any:
        if when.happens(progress.step):
            _wait_forever()
        return original(self, progress)

    Checkpoints.save = save  # type: ignore[method-assign]


def slow(when: When, seconds: float) -> None:
    _before_step(when, lambda: time.sleep(seconds))


def scale_loss(when: When, factor: float) -> None:
    """NaN, or a spike, in the loss and so in every gradient."""
    from megazebra.train.engine import TrainEngine

    original = TrainEngine.train_step

    def train_step(self: Any, micro_batches: Any, step: int) -> Any:
        forward = self.forward
        if when.happens(step + 1):
            self.forward = lambda module, batch: forward(module, batch) * factor
        try:
            return original(self, micro_batches, step)
        finally:
            self.forward = forward

    TrainEngine.train_step = train_step  # type: ignore[method-assign]


def cut_network(when: When) -> None:
    """Every connection of the rank breaks."""
    _before_step(when, _shut_connections)


def unplug(when: When) -> None:
    """The cable between the two nodes of support/nodes.py: nothing arrives any more, and nobody is told."""
    move_to_own_node()
    _before_step(when, lambda: ip("link", "set", CABLE, "down"))


def fill_disk_of_metrics(when: When) -> None:
    """From then on the system refuses every byte."""
    from megazebra.train.metrics import MetricsFile

    original = MetricsFile.write

    def write(self: MetricsFile, row: dict[str, Any]) -> None:
        if row["kind"] == "train" and when.happens(row["step"]):
            self._file = open("/dev/full", "w")  # noqa: SIM115
        original(self, row)

    MetricsFile.write = write  # type: ignore[method-assign]


def do(when: When, action: Callable[[], object]) -> None:
    """Anything that the test wants done before the step."""
    _before_step(when, action)


def _before_step(when: When, action: Callable[[], object]) -> None:
    from megazebra.train.engine import TrainEngine

    original = TrainEngine.train_step

    def train_step(self: Any, micro_batches: Any, step: int) -> Any:
        if when.happens(step + 1):
            action()
        return original(self, micro_batches, step)

    TrainEngine.train_step = train_step  # type: ignore[method-assign]


def _wait_forever() -> NoReturn:
    while True:
        threading.Event().wait(60)


def _shut_connections() -> None:
    for number in os.listdir("/proc/self/fd"):
        try:
            if not stat.S_ISSOCK(os.fstat(int(number)).st_mode):
                continue
            with socket.socket(fileno=os.dup(int(number))) as connection:
                listens = connection.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
                if connection.family in (socket.AF_INET, socket.AF_INET6) and not listens:
                    connection.shutdown(socket.SHUT_RDWR)
        except OSError:  # it was closed meanwhile
            continue


def _rank() -> int:
    return int(os.environ["RANK"])


def _read(path: Path) -> str:
    return path.read_text() if path.exists() else ""
