"""A signal to one rank stops all of them after the same step; the run saves, says so and can go on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from support.command_line import ROOT, arguments, environment, run_alone, train_rows
from support.distributed import run_distributed
from support.training import tiny_config

from megazebra.data.corpus.corpus_writer import CorpusWriter
from megazebra.launch import REQUEUE_EXIT_CODE
from megazebra.parallel.mesh import ParallelMesh
from megazebra.train.stopping import StopRequest


def ask_one_rank() -> list[signal.Signals | None]:
    world, request = ParallelMesh.build(tiny_config().parallel).world, StopRequest()
    request.listen()
    answers = [request.anywhere(world, torch.device("cpu"))]
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGUSR1)
    return [*answers, request.anywhere(world, torch.device("cpu"))]


def test_all_ranks_hear_of_a_signal_to_one() -> None:
    assert run_distributed(ask_one_rank, 2) == [[None, signal.SIGUSR1]] * 2


ASKED_WHILE_IMPORTING = """
import os, runpy, signal, sys

class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "torch":
            os.kill(os.getpid(), signal.{signal})

sys.meta_path.insert(0, Finder)
sys.argv = {arguments}
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_before_training_requeues_at_once(tmp_path: Path, name: str) -> None:
    code = ASKED_WHILE_IMPORTING.format(signal=name, arguments=arguments(tmp_path, tmp_path / "run"))
    ended = run_alone("-c", code)
    assert ended.returncode == REQUEUE_EXIT_CODE, ended.stderr
    assert f"{name} received before training has begun" in ended.stderr


def test_a_stopped_run_is_saved_and_can_be_requeued(tmp_path: Path) -> None:
    for name in ("train", "validation"):
        with CorpusWriter(tmp_path / name, vocab_size=512) as writer:
            writer.add_document(list(range(512)) * 40)
    run_dir = tmp_path / "run"
    command = [sys.executable, *arguments(tmp_path, run_dir, "--train.steps=100000", "--checkpoint.interval=0")]
    process = subprocess.Popen(
        command, env=environment(), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    metrics = run_dir / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.stat().st_size > 2000):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == REQUEUE_EXIT_CODE, output
    last = train_rows(run_dir)[-1]["step"]
    assert f"SIGTERM received: stopped after step {last}, which is saved" in output
    assert (run_dir / "checkpoints" / "latest").read_text() == f"step_{last:08d}\n"
