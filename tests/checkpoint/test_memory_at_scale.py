"""Tensors of Llama-2-7B's sizes, in a checkpoint of four ranks: read in the memory of one of them, or of none.

One layer and the embeddings, weights without moments: 1.9 GB on the disk, and half as much for the merged model.
"""

from __future__ import annotations

import os
import sys
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from bench.measure import in_fresh_process, peak_bytes
from bench.scratch import scratch_folder
from support.fake_ranks import model_on_paper, rank_of
from support.training import CPU, make_engine

from megazebra.checkpoint.fragments import write_pieces
from megazebra.checkpoint.manager import Checkpoints, Progress
from megazebra.checkpoint.merge import Merge
from megazebra.checkpoint.reader import TrainingCheckpoint
from megazebra.checkpoint.store import FORMAT_VERSION, Entry, write_index
from megazebra.config.schema import Config
from megazebra.durable import write_atomically
from megazebra.launch import complete_environment
from megazebra.parallel.mesh import ParallelMesh
from megazebra.parallel.sharding import full_shape
from megazebra.train.engine import start_deepspeed
from megazebra.train.guard import SpikeGuard

MIB = 2**20
RANKS, TENSOR, STAGE = 4, 2, 3
STEP = 1


def seven_billion(run_dir: Path, **parallel: int) -> Config:
    model = {"num_layers": 1, "hidden_size": 4096, "ffn_hidden_size": 11008, "num_attention_heads": 32,
             "vocab_size": 32000, "pattern": "G"}  # fmt: skip
    train = {"steps": 2, "global_batch_size": 2, "micro_batch_size": 1, "precision": "fp32"}
    return Config.model_validate(
        {"model": model, "train": train, "optimizer": {"name": "sgd"}, "data": {"seq_len": 64},
         "parallel": parallel, "run": {"dir": str(run_dir)}}
    )  # fmt: skip


def write_checkpoint(run_dir: Path) -> None:
    """What ranks under tensor parallelism and ZeRO-3 would write, with random weights, one rank after another."""
    config = seven_billion(run_dir, tensor=TENSOR, zero_stage=STAGE)
    folder = run_dir / "checkpoints" / f"step_{STEP:08d}"
    folder.mkdir(parents=True)
    entries: dict[Path, Entry] = {}
    parameters: dict[str, Any] = {}
    for rank in range(RANKS):
        with rank_of(RANKS, rank):
            mesh = ParallelMesh.build(config.parallel)
            tensors = {}
            for name, parameter in model_on_paper(config, mesh).named_parameters():
                parameters[name] = {
                    "shape": list(full_shape(parameter, parameter.shape)),
                    "partition_dim": getattr(parameter, "partition_dim", None),
                }
                count = parameter.numel() // mesh.dp_cp.size
                tensors[f"{name}|{mesh.dp_cp.rank * count}|master"] = torch.rand(count)
            entries |= write_pieces(tensors, folder, mesh)
    index = {
        "format": FORMAT_VERSION,
        "progress": {"step": STEP, "samples": 2, "tokens": 128},
        "guard": SpikeGuard(config.train.guard).state_dict(),
        "layout": {"data": RANKS // TENSOR, "context": 1, "tensor": TENSOR, "zero_stage": STAGE},
        "data": {},
        "config": config.model_dump(mode="json"),
        "parameters": parameters,
        "files": {path.name: entry for path, entry in entries.items()},
    }
    write_index(folder, index)
    write_atomically(run_dir / "checkpoints" / "latest", folder.name.encode())


def peak_of_merging(run_dir: Path, output: Path) -> int:
    def merge() -> None:
        Merge(TrainingCheckpoint.open(run_dir), output, torch.bfloat16, with_optimizer=False).write(5 * 10**9)

    return peak_bytes(merge)


def peak_of_resuming(run_dir: Path) -> int:
    """Beside the engine of one process, which holds the whole model."""
    complete_environment()
    start_deepspeed(CPU, timeout_s=60)
    config = seven_billion(run_dir)
    checkpoints = Checkpoints(config, make_engine(config), {})
    progress: list[Progress] = []
    peak = peak_bytes(lambda: progress.append(checkpoints.resume()))
    assert progress == [Progress(STEP, 2, 128)]
    return peak


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read from /proc")
def test_merging_and_resuming_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "DS_ACCELERATOR", "cpu")
    with scratch_folder("test_memory_at_scale", str(tmp_path)) as folder:
        in_fresh_process(write_checkpoint, folder / "run")
        checkpoint = TrainingCheckpoint.open(folder / "run")
        largest = max(prod(checkpoint.shape(name)) for name in checkpoint.names) * torch.bfloat16.itemsize
        assert largest == 32000 * 4096 * 2
        merging = in_fresh_process(peak_of_merging, folder / "run", folder / "merged")
        resuming = in_fresh_process(peak_of_resuming, folder / "run")
    size = sum(checkpoint.files.values())
    print(f"{size / 1e9:.2f} GB: merging took {merging / 1e6:.0f} MB, resuming {resuming / 1e6:.0f} MB")
    # Beside the largest weight: a block, two of the file that is verified, code loaded on first use, what malloc keeps.
    assert merging < largest + 128 * MIB
    assert resuming < 2 * largest + 128 * MIB  # one weight in fp32, as pages of its file
