"""pretrain_zebra.py on several ranks that nobody launches or ends: how each of them ends is its own doing."""

from __future__ import annotations

import os
import runpy
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from support.command_line import ROOT
from support.distributed import forkserver

PRETRAIN = ROOT / "pretrain_zebra.py"


class Ranks:
    """Forked from a server that has torch and DeepSpeed imported. `faults` are called in each of them first."""

    def __init__(
        self, arguments: Sequence[str], log: Path, *, ranks: int = 2, faults: Sequence[Callable[[], None]] = ()
    ) -> None:
        self.log = log
        self.port = free_port()
        self.processes = [
            forkserver.Process(
                target=run_rank, args=(rank, ranks, self.port, list(arguments), log, faults), daemon=True
            )
            for rank in range(ranks)
        ]
        for process in self.processes:
            process.start()

    def end(self, timeout: float = 120) -> list[int | None]:
        """Exit codes of the ranks once all have ended; None for one that is stopped and had to be killed."""
        deadline = time.monotonic() + timeout
        codes: list[int | None] = []
        for process in self.processes:
            while process.exitcode is None and not _is_stopped(process.pid):
                if time.monotonic() > deadline:
                    self.kill()
                    pytest.fail(f"did not end in {timeout} s:\n{self.output}")
                time.sleep(0.02)
            codes.append(process.exitcode)
        self.kill()
        return codes

    @property
    def listens(self) -> bool:
        """Whether rank 0 waits for the others to connect."""
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()

    @property
    def output(self) -> str:
        return self.log.read_text() if self.log.exists() else ""


def run_rank(
    rank: int, world_size: int, port: int, arguments: list[str], log: Path | None, faults: Sequence[Callable[[], None]]
) -> None:
    """Become a rank of a run: what a launcher puts into its environment, then the program."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu",
    )  # fmt: skip
    import torch

    torch.set_num_threads(1)
    if log is not None:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    for fault in faults:
        fault()
    sys.argv = arguments
    runpy.run_path(arguments[0], run_name="__main__")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _is_stopped(pid: int | None) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except OSError:
        return False
