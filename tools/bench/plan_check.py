"""The planner's memory beside that of real steps: small layouts on this machine's CPU, every rank a fresh process."""

from __future__ import annotations

import gc
import multiprocessing
import os
import socket
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple
from unittest.mock import patch

import torch

from bench.measure import peak_bytes
from megazebra.config.schema import Config
from megazebra.context.choice import sequence_multiple
from megazebra.data.batch import MicroBatch
from megazebra.models.build import build_model, forward, model_runtime
from megazebra.parallel.mesh import ParallelMesh
from megazebra.plan.memory import peak_memory
from megazebra.train.deepspeed_config import deepspeed_config
from megazebra.train.engine import TrainEngine, start_deepspeed

CPU = torch.device("cpu")
# Large enough that what the libraries allocate for themselves is little, small enough for seconds.
MODEL = {
    "num_layers": 6,
    "hidden_size": 512,
    "ffn_hidden_size": 1376,
    "num_attention_heads": 8,
    "num_kv_heads": 4,
    "vocab_size": 4096,
    "max_position_embeddings": 4096,
    "pattern": "GLL",
    "window": 256,
}
TINY = {"num_layers": 3, "hidden_size": 256, "ffn_hidden_size": 64, "vocab_size": 64, "window": 16}
TRAIN = {"precision": "fp32", "micro_batch_size": 1, "loss_chunk": 256, "guard": {"enabled": False}}
SEQ_LEN = 2048


class Layout(NamedTuple):
    ranks: int
    parallel: dict[str, Any]
    train: dict[str, Any] = {}  # noqa: RUF012


LAYOUTS = {
    "one rank": Layout(1, {"zero_stage": 0}),
    "one rank, recomputed": Layout(1, {"zero_stage": 0}, {"recompute": "full"}),
    "tp 2, sequence parallel, selective": Layout(
        2, {"tensor": 2, "sequence_parallel": True, "zero_stage": 0}, {"recompute": "selective"}
    ),
    "cp 2, ZeRO 1": Layout(2, {"context": 2, "zero_stage": 1}),
    "dp 2, ZeRO 1": Layout(2, {"zero_stage": 1}),
    "dp 2, ZeRO 2, accumulated": Layout(2, {"zero_stage": 2}, {"global_batch_size": 4}),
    "dp 2, ZeRO 3, recomputed": Layout(2, {"zero_stage": 3}, {"recompute": "full"}),
}


class Comparison(NamedTuple):
    """Bytes; measured is the most of all ranks."""

    name: str
    predicted: int
    measured: int


def compare(names: list[str], seq_len: int = SEQ_LEN) -> Iterator[Comparison]:
    for name in names:
        layout = LAYOUTS[name]
        predicted = peak_memory(configuration(layout, seq_len), layout.ranks, resident=True).total
        yield Comparison(name, predicted, max(_measured(layout, seq_len)))


def configuration(layout: Layout, seq_len: int, **model: Any) -> Config:
    replicas = layout.ranks // (layout.parallel.get("tensor", 1) * layout.parallel.get("context", 1))
    return Config.model_validate(
        {
            "model": {**MODEL, **model},
            "parallel": layout.parallel,
            "train": {"global_batch_size": replicas, **TRAIN, **layout.train},
            "data": {"seq_len": seq_len},
        }
    )


def _measured(layout: Layout, seq_len: int) -> list[int]:
    """Bytes that each rank's training adds to a process that holds the libraries already."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    queue: Any = context.Queue()
    processes = [
        context.Process(target=_rank, args=(layout, seq_len, rank, port, queue)) for rank in range(layout.ranks)
    ]
    # Every tensor a mapping of its own: what is freed is given back at once, and nothing lies idle in between.
    # The allocator reads this when a process starts.
    with patch.dict(os.environ, {"MALLOC_MMAP_THRESHOLD_": "65536"}):
        for process in processes:
            process.start()
    try:
        return [queue.get(timeout=300) for _ in processes]
    finally:
        for process in processes:
            process.join(timeout=10)
            process.kill()


def _rank(layout: Layout, seq_len: int, rank: int, port: int, queue: Any) -> None:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // layout.ranks))
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(layout.ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    start_deepspeed(CPU, timeout_s=120)
    _train(configuration(layout, 64, **TINY))
    gc.collect()  # engines are full of cycles: what is let go later would not be counted
    queue.put(peak_bytes(lambda: _train(configuration(layout, seq_len))))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def _train(config: Config) -> None:
    """Two steps: in the second, the optimizer has its states from the beginning."""
    mesh, runtime = ParallelMesh.build(config.parallel), model_runtime(config, CPU)
    engine = TrainEngine(
        config, mesh, CPU, deepspeed_config(config, mesh.dp.size), lambda: build_model(config, mesh, runtime), forward
    )
    tokens_BS = torch.randint(config.model.vocab_size, (1, config.data.seq_len))
    positions_BS = torch.arange(config.data.seq_len)[None]
    batch = MicroBatch(tokens_BS, tokens_BS, positions_BS, None, [0], config.data.seq_len, config.data.seq_len)
    part = batch.padded(sequence_multiple(config)).context_slice(mesh.cp.rank, mesh.cp.size)
    count = config.train.global_batch_size // (config.train.micro_batch_size * mesh.dp.size)
    for step in range(2):
        engine.train_step([replace(part) for _ in range(count)], step)
    engine.deepspeed.destroy()
