"""Tasks over worker processes, each with an encoder of its own."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

from megazebra.data.errors import CorpusError
from megazebra.data.prepare.encode_task import Progress, Work, encode_task
from megazebra.data.prepare.encoders.encoded import DocumentEncoder
from megazebra.data.prepare.inputs.tasks import Task
from megazebra.data.prepare.open_encoder import open_encoder


class WorkerDiedError(RuntimeError):
    """A worker process ended without saying why: it was killed, or printed a traceback."""


NumberedTask = tuple[int, Task]


def run_tasks(work: Work, encoder: DocumentEncoder, tasks: Sequence[NumberedTask], workers: int) -> Iterator[Progress]:
    """Encode the tasks on `workers` cores: by as many processes as there is enough to do for, each with its threads.

    encoder: opened with as many threads as there are workers; it encodes where this process is the only one.
    Raises what a worker raised (CorpusError, OSError), and WorkerDiedError. However it ends, no process is left behind.
    """
    total_bytes = sum(task.bytes for _, task in tasks)
    processes = max(1, min(workers, len(tasks), total_bytes // work.sizes.process))
    work = replace(work, encoder=replace(work.encoder, threads=max(1, workers // processes)))
    # Large tasks first, so that none of them begins when the other processes have nothing left to do.
    queue = sorted(tasks, key=lambda numbered: -numbered[1].bytes)
    return _in_processes(work, queue, processes) if processes > 1 else _in_this_process(work, encoder, queue)


def _in_this_process(work: Work, encoder: DocumentEncoder, queue: Sequence[NumberedTask]) -> Iterator[Progress]:
    for number, task in queue:
        yield from encode_task(number, task, encoder, work)


def _in_processes(work: Work, queue: Sequence[NumberedTask], processes: int) -> Iterator[Progress]:
    waiting = iter(queue)
    workers: dict[Connection, BaseProcess] = {}
    try:
        with _interrupts_ignored():
            for _ in range(processes):
                connection, process = _start(work)
                workers[connection] = process
        for connection in workers:
            _send(connection, next(waiting))
        busy = set(workers)
        while busy:
            for ready in wait(list(busy)):
                assert isinstance(ready, Connection)
                message = _receive(ready, workers[ready])
                if isinstance(message, Progress):
                    yield message
                    continue
                task = next(waiting, None)
                if task is None:
                    busy.remove(ready)
                else:
                    _send(ready, task)
    except BaseException:
        for process in workers.values():
            process.terminate()
        raise
    finally:
        for connection, process in workers.items():
            connection.close()  # a worker without a task ends here
            process.join()


@contextlib.contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """Processes started meanwhile never see Ctrl-C, which a terminal sends to all; the main process ends them."""
    if threading.current_thread() is not threading.main_thread():  # may not, and is not interrupted
        yield
        return
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def _start(work: Work) -> tuple[Connection, BaseProcess]:
    # Not forked: a copy of a process whose tokenizer has started threads would hang.
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(work, theirs), daemon=True)
    process.start()
    theirs.close()  # so that the worker's end closes with the worker
    return ours, process


def _send(connection: Connection, task: NumberedTask) -> None:
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # receiving tells why
        connection.send(task)


def _receive(connection: Connection, process: BaseProcess) -> Progress | None:
    """The worker's progress, None when its task is done; raises its error."""
    try:
        message = connection.recv()
    except (EOFError, ConnectionResetError):
        process.join()
        code = process.exitcode or 0
        if code >= 0:
            raise WorkerDiedError(f"a worker process ended with exit code {code}; its traceback is above") from None
        name = signal.Signals(-code).name
        hint = " (a system short of memory does that; fewer --workers take less)" if name == "SIGKILL" else ""
        raise WorkerDiedError(f"a worker process was killed by {name}{hint}") from None
    if isinstance(message, Exception):
        raise message
    return message


def _serve(work: Work, connection: Connection) -> None:
    """A worker process: tasks in; progress, None for a task done, or the error out. Ends when the other side does."""
    with contextlib.suppress(EOFError, ConnectionResetError, BrokenPipeError):
        try:
            encoder = open_encoder(work.encoder)
            while True:
                number, task = connection.recv()
                for progress in encode_task(number, task, encoder, work):
                    connection.send(progress)
                connection.send(None)
        except (CorpusError, OSError) as error:
            connection.send(error)
