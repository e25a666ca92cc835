"""Starting pretrain_zebra.py and the tools as a user does, and what a run leaves behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megazebra.train.metrics import read_metrics

ROOT = Path(__file__).parents[2]
STEPS = 16
SETTINGS = [
    "--model.num_layers=4", "--model.hidden_size=32", "--model.ffn_hidden_size=64", "--model.num_attention_heads=4",
    "--model.num_kv_heads=2", "--model.vocab_size=512", "--model.window=16", "--model.max_position_embeddings=64",
    f"--train.steps={STEPS}", "--train.micro_batch_size=2", "--train.global_batch_size=4", "--train.precision=fp32",
    "--optimizer.lr=0.003", "--schedule.warmup_steps=2", "--data.seq_len=64", "--validation.interval=8",
    "--validation.samples=5", "--checkpoint.interval=4",
]  # fmt: skip


def environment(**more: str) -> dict[str, str]:
    clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
    return {**clean, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", **more}


def arguments(corpus: Path, run_dir: Path, *more: str) -> list[str]:
    data = [f"--data.path={corpus}/train", f"--data.validation_path={corpus}/validation"]
    return [str(ROOT / "pretrain_zebra.py"), *SETTINGS, *data, f"--run.dir={run_dir}", *more]


def launch(port: int, *args: str, ranks: int = 2) -> subprocess.Popen[str]:
    """`deepspeed pretrain_zebra.py ...` in a process group of its own; its output is one stream."""
    launcher = str(Path(sys.executable).with_name("deepspeed"))
    return subprocess.Popen(
        [launcher, "--num_gpus", str(ranks), "--master_port", str(port), *args],
        env=environment(),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str], timeout: float = 120) -> str:
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        pytest.fail(f"did not end in {timeout} s:\n{output}")
    return output


def run_alone(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    """`python pretrain_zebra.py ...`: one process, no launcher."""
    return subprocess.run(
        [sys.executable, *args], env=environment(**env), cwd=ROOT, capture_output=True, text=True, timeout=120
    )


def train_rows(run_dir: Path) -> list[dict[str, Any]]:
    return [row for row in read_metrics(run_dir / "metrics.jsonl") if row["kind"] == "train"]


def losses(run_dir: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in train_rows(run_dir)]
