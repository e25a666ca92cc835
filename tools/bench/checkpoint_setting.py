"""What tools/bench_checkpoint.py saves and loads: the state of a real engine; and the turns of its sides."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from bench.measure import interleaved
from megazebra.checkpoint.manager import Checkpoints, Progress
from megazebra.config.schema import Config
from megazebra.data.batch import MicroBatch
from megazebra.launch import complete_environment
from megazebra.models.build import build_model, forward, model_runtime
from megazebra.parallel.mesh import ParallelMesh
from megazebra.train.deepspeed_config import deepspeed_config
from megazebra.train.engine import TrainEngine, start_deepspeed

CPU = torch.device("cpu")
SEQ_LEN = 64


@dataclass(frozen=True)
class Setting:
    """saved: a checkpoint of the engine's state. turn: a folder that is empty when a turn begins."""

    engine: TrainEngine
    config: Config
    saved: Path
    turn: Path
    rounds: int

    @property
    def bytes(self) -> int:
        return sum(file.stat().st_size for file in self.saved.iterdir())

    def checkpoints(self, run_dir: Path, *, asynchronous: bool = False) -> Checkpoints:
        return _checkpoints(self.config, self.engine, run_dir, asynchronous)

    def in_turns(self, sides: dict[str, Callable[[], float]]) -> dict[str, float]:
        """Median of the seconds that each side returns."""

        def clock(side: Callable[[], float]) -> float:
            self.clear()
            return side()

        return interleaved(sides, self.rounds, clock)

    def clear(self) -> None:
        shutil.rmtree(self.turn, ignore_errors=True)
        self.turn.mkdir()
        os.sync()

    def copy(self) -> None:
        subprocess.run(["cp", "-r", self.saved, self.turn / "copy"], check=True)

    def copy_synced(self) -> None:
        self.copy()
        subprocess.run(["sync", *(self.turn / "copy").iterdir(), self.turn / "copy"], check=True)


@contextmanager
def saved_setting(folder: Path, hidden: int, vocab: int, rounds: int) -> Iterator[Setting]:
    """The state of one layer of Llama's shape after a step, in memory and under `folder`."""
    complete_environment()
    start_deepspeed(CPU, timeout_s=60)
    config = _configuration(hidden, vocab)
    engine = _trained_engine(config)
    (saving,) = _checkpoints(config, engine, folder / "run", asynchronous=False).save(Progress())
    yield Setting(engine, config, saving.folder, folder / "turn", rounds)
    dist.destroy_process_group()


def _checkpoints(config: Config, engine: TrainEngine, run_dir: Path, asynchronous: bool) -> Checkpoints:
    run = config.run.model_copy(update={"dir": str(run_dir)})
    checkpoint = config.checkpoint.model_copy(update={"asynchronous": asynchronous})
    return Checkpoints(config.model_copy(update={"run": run, "checkpoint": checkpoint}), engine, {})


def _configuration(hidden: int, vocab: int) -> Config:
    """One layer: heads of 128, and 8/3 of the width in multiples of 256."""
    model = {
        "num_layers": 1,
        "hidden_size": hidden,
        "ffn_hidden_size": -(-hidden * 8 // 3 // 256) * 256,
        "num_attention_heads": max(1, hidden // 128),
        "vocab_size": vocab,
        "pattern": "G",
    }
    train = {"steps": 1, "global_batch_size": 1, "micro_batch_size": 1, "precision": "fp32"}
    return Config.model_validate({"model": model, "train": train, "data": {"seq_len": SEQ_LEN}})


def _trained_engine(config: Config) -> TrainEngine:
    """After one step: the optimizer has its moments."""
    mesh, runtime = ParallelMesh.build(config.parallel), model_runtime(config, CPU)
    engine = TrainEngine(
        config, mesh, CPU, deepspeed_config(config, mesh.dp.size), lambda: build_model(config, mesh, runtime), forward
    )
    tokens_BS = torch.randint(config.model.vocab_size, (1, SEQ_LEN))
    batch = MicroBatch(tokens_BS, tokens_BS, torch.arange(SEQ_LEN)[None], None, [0], SEQ_LEN, SEQ_LEN)
    engine.train_step([batch], 0)
    return engine
