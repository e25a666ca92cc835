"""A process's place among its peers before torch is there, and how errors reach the user. Imports no torch."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megazebra.errors import UserError, passes

# How a run ends that is not complete, for whoever starts it again; anything else is a failure.
USER_ERROR_EXIT_CODE = 2
REQUEUE_EXIT_CODE = 85  # it was asked to stop, has saved and can go on: scripts requeue on it
HANG_EXIT_CODE = 86  # the watchdog has ended it
INTERRUPTED_EXIT_CODE = 130

# Slurm sends SIGTERM before it preempts a job, and with `#SBATCH --signal=USR1@300` SIGUSR1 before its time is over.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

# Long enough for rank 0 to speak and for the launcher, which polls every second, to end the others.
_RANK_ZERO_SPEAKS_FIRST_S = 4.0
# The exit code that says why is that of the rank which died: the others let it go first.
_CULPRIT_EXITS_FIRST_S = _RANK_ZERO_SPEAKS_FIRST_S + 2.0
_LOST_CONNECTION = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def complete_environment() -> None:
    """Set what torch.distributed reads where the launcher has not.

    DeepSpeed's launcher and torchrun set it all. `srun python pretrain_zebra.py` gives Slurm's own names, and
    a plain `python pretrain_zebra.py` is a run of one process.
    """
    if "RANK" not in os.environ and "SLURM_STEP_NUM_TASKS" in os.environ:  # only inside an srun step
        _set_missing(
            RANK=os.environ["SLURM_PROCID"],
            WORLD_SIZE=os.environ["SLURM_STEP_NUM_TASKS"],
            LOCAL_RANK=os.environ["SLURM_LOCALID"],
            LOCAL_WORLD_SIZE=os.environ["SLURM_STEP_TASKS_PER_NODE"].split("(")[0].split(",")[0],
            # Jobs that share a node must not share a port.
            MASTER_PORT=str(20000 + int(os.environ["SLURM_JOB_ID"]) % 20000),
        )
        if "MASTER_ADDR" not in os.environ:
            os.environ["MASTER_ADDR"] = _first_slurm_host(os.environ["SLURM_STEP_NODELIST"])
    _set_missing(
        RANK="0",
        WORLD_SIZE="1",
        LOCAL_RANK="0",
        LOCAL_WORLD_SIZE=os.environ.get("LOCAL_SIZE", "1"),  # DeepSpeed's launcher says LOCAL_SIZE
        MASTER_ADDR="127.0.0.1",
    )
    # Runs of one process share a machine easily; several processes need a port they can agree on.
    _set_missing(MASTER_PORT=str(_free_port()) if os.environ["WORLD_SIZE"] == "1" else "29500")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _first_slurm_host(nodelist: str) -> str:
    command = ["scontrol", "show", "hostnames", nodelist]
    try:
        names = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(
            f"SLURM_STEP_NODELIST={nodelist} cannot be taken apart ({error}); export MASTER_ADDR=<the first host>"
        ) from error
    return names.stdout.split()[0]


def _set_missing(**variables: str) -> None:
    for name, value in variables.items():
        os.environ.setdefault(name, value)


def end_when_asked_to_stop() -> None:
    """Let STOP_SIGNALS end the process at once with REQUEUE_EXIT_CODE: before training, nothing is there to be saved.

    Call it first; it holds until `stop_is_handled_elsewhere`. A thread does it, since the main one may be
    waiting in C++ for ranks that are still importing torch, where no handler of Python's is run.
    """
    reads, writes = os.pipe()
    os.set_blocking(writes, False)
    signal.set_wakeup_fd(writes)
    for number in STOP_SIGNALS:
        signal.signal(number, lambda number, frame: None)  # only signals with a handler reach the pipe

    def wait() -> None:
        while (number := int.from_bytes(os.read(reads, 1), "big")) not in STOP_SIGNALS:
            if number == 0:  # the other end is closed
                return
        if rank() == 0:
            message = f"{signal.Signals(number).name} received before training has begun: nothing is there to be saved"
            print(message, file=sys.stderr, flush=True)
        os._exit(REQUEUE_EXIT_CODE)

    threading.Thread(target=wait, name="stop_signals", daemon=True).start()


def stop_is_handled_elsewhere() -> None:
    """End what `end_when_asked_to_stop` began, once other handlers are set."""
    writes = signal.set_wakeup_fd(-1)
    if writes != -1:
        os.close(writes)


@contextmanager
def readable_errors() -> Iterator[None]:
    """End the process with one message for errors a user can mend, with a traceback for the others.

    A user's are UserError, the ValueErrors that our own code raises (configuration, data, layout), and files that
    cannot be read or written, other than for a while (errors.passes). Rank 0 prints them; other ranks only if they are
    still alive after rank 0 had its time, since then the error is theirs alone. MEGAZEBRA_TRACEBACK=1 shows where a
    message came from. The exit is immediate: waiting for collectives with a rank that is gone would hang.
    """
    try:
        yield
    except SystemExit:
        raise
    except KeyboardInterrupt:
        _exit(INTERRUPTED_EXIT_CODE, "interrupted")
    except BaseException as error:
        if os.environ.get("MEGAZEBRA_TRACEBACK") == "1":
            traceback.print_exc()
        if is_users(error):
            _exit(USER_ERROR_EXIT_CODE, f"error: {error}")
        if isinstance(error, RuntimeError) and any(text in str(error) for text in _LOST_CONNECTION):
            print(f"rank {rank()} lost the connection to another rank; see that one's own message", file=sys.stderr)
            sys.stderr.flush()
            time.sleep(_CULPRIT_EXITS_FIRST_S)
            os._exit(1)
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def is_users(error: BaseException) -> bool:
    """Whether an error is a message to the user, by its type or by where it was raised, and no defect of ours."""
    if isinstance(error, UserError):
        return True
    if isinstance(error, ValueError):  # one that Python, numpy or torch raises is a defect of ours
        where = traceback.extract_tb(error.__traceback__)[-1]
        on_purpose = (where.line or "").startswith("raise ")  # compiled functions have no frame of their own
        return on_purpose and Path(where.filename).is_relative_to(Path(__file__).parent)
    return isinstance(error, OSError) and error.filename is not None and not passes(error)


def _exit(code: int, message: str) -> None:
    if rank() != 0:
        time.sleep(_RANK_ZERO_SPEAKS_FIRST_S)
        message = f"rank {rank()}: {message}"
    print(message, file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(code)
