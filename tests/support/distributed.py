"""Run a function on several gloo ranks of this machine and get what each returned.

Workers are forked from a server that has torch and DeepSpeed imported already: a 4-rank test starts in
tenths of a second instead of many.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import Any

forkserver = multiprocessing.get_context("forkserver")
forkserver.set_forkserver_preload(
    [
        "torch",
        "torch.distributed",
        "torch._dynamo",
        "torch._inductor.compile_fx",
        "support.deepspeed_preload",
        "megazebra.train.engine",
    ]
)


def run_distributed(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 240) -> list[Any]:
    """`function(*args)` on every rank; results in rank order.

    The function must be importable (module level) and its results picklable. A rank's exception ends all
    of them and is raised here with its traceback; so does a time-out.
    """
    with tempfile.TemporaryDirectory() as folder:
        queue = forkserver.Queue()
        processes = [
            forkserver.Process(target=_worker, args=(function, rank, world_size, folder, queue, args), daemon=True)
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        try:
            return _collect(queue, processes, world_size, time.monotonic() + timeout)
        finally:
            for process in processes:
                process.join(timeout=5)
                if process.is_alive():
                    process.kill()
                    process.join()


def _collect(queue: Any, processes: list[Any], world_size: int, deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < world_size:
        if time.monotonic() > deadline:
            raise TimeoutError(f"ranks {sorted(set(range(world_size)) - set(results))} did not finish in time")
        if queue.empty():
            time.sleep(0.005)
            dead = [rank for rank, p in enumerate(processes) if p.exitcode not in (None, 0) and rank not in results]
            if dead and queue.empty():
                raise RuntimeError(f"rank {dead[0]} died with exit code {processes[dead[0]].exitcode}")
            continue
        rank, ok, value = queue.get()
        if not ok:
            for process in processes:
                process.kill()
            raise RuntimeError(f"rank {rank} raised:\n{value}")
        results[rank] = pickle.loads(value)
    return [results[rank] for rank in range(world_size)]


def _worker(function: Callable[..., Any], rank: int, world_size: int, folder: str, queue: Any, args: Any) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    # As in the tests themselves; torch and DeepSpeed warn about each other's deprecated calls.
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", module=r"(torch|deepspeed)(\.|$)")
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_SIZE=str(world_size))
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/rendezvous",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=120),
        )
        # By value: torch's own pickling shares memory, which is gone when this process ends.
        queue.put((rank, True, pickle.dumps(function(*args))))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        queue.put((rank, False, traceback.format_exc()))
        raise SystemExit(1) from None
