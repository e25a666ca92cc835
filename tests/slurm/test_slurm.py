"""examples/slurm on a real Slurm: signalled, preempted and requeued, a run ends as if it had been left alone."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cluster import obstacle, running_slurm
from support.command_line import ROOT, arguments, environment, train_rows

from megazebra.data.corpus.corpus_writer import CorpusWriter
from megazebra.train.metrics import read_metrics

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(obstacle() is not None, reason=f"no Slurm: {obstacle()}"),
]

STEPS = 160
# What a run computes, as against how long it took.
COMPUTED = ("kind", "step", "source", "tokens", "loss", "grad_norm", "lr", "comm_bytes")


class Slurm:
    def __init__(self, environment: dict[str, str]) -> None:
        self.environment = environment

    def command(self, *command: str) -> str:
        done = subprocess.run(command, env=self.environment, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout.strip()

    def train(self, corpus: Path, run_dir: Path) -> str:
        """Submit examples/slurm/pretrain.sbatch for two CPU nodes with two ranks each; the job's number."""
        return self.command(
            "sbatch", "--parsable", "--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=0", "--cpus-per-task=1",
            f"--output={run_dir}.log", f"--job-name={run_dir}", "examples/slurm/pretrain.sbatch",
            *arguments(corpus, run_dir)[1:], f"--train.steps={STEPS}", "--train.micro_batch_size=1",
            "--parallel.tensor=2", "--checkpoint.interval=0", "--validation.interval=80",
        )  # fmt: skip

    def state(self, job: str) -> dict[str, str]:
        fields = self.command("scontrol", "--oneliner", "show", "job", job).split()
        return dict(field.split("=", 1) for field in fields if "=" in field)

    def release(self, job: str) -> None:
        """Slurm holds a requeued job for two minutes; a test need not wait."""
        if self.state(job)["Reason"] == "BeginTime":
            self.command("scontrol", "update", f"job={job}", "StartTime=now")

    def wait(self, job: str, seconds: float = 300) -> dict[str, str]:
        """The job's state once it has ended; requeued does not count."""
        deadline = time.monotonic() + seconds
        while (state := self.state(job))["JobState"] in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING"):
            assert time.monotonic() < deadline, state
            self.release(job)
            time.sleep(0.5)
        return state

    def wait_for_step(self, job: str, run_dir: Path, step: int, seconds: float = 300) -> None:
        deadline = time.monotonic() + seconds
        while not (run_dir / "metrics.jsonl").exists() or len(train_rows(run_dir)) < step:
            assert time.monotonic() < deadline, self.state(job)
            self.release(job)
            time.sleep(0.1)


@pytest.fixture
def slurm() -> Iterator[Slurm]:
    with running_slurm() as where:
        variables = {"VENV": str(Path(sys.executable).parents[1]), "CONFIG": "examples/tiny_cpu.yaml"}
        yield Slurm({**environment(), **where, **variables})


def computed(run_dir: Path) -> list[dict[str, Any]]:
    return [{name: row.get(name) for name in COMPUTED} for row in read_metrics(run_dir / "metrics.jsonl")
            if row["kind"] in ("train", "validation")]  # fmt: skip


def test_a_run_that_is_stopped_twice_ends_like_one_that_is_not(slurm: Slurm, tmp_path: Path) -> None:
    for name in ("train", "validation"):
        with CorpusWriter(tmp_path / name, vocab_size=512) as writer:
            writer.add_document([i * i % 509 for i in range(40_000)])
    undisturbed, disturbed = tmp_path / "undisturbed", tmp_path / "disturbed"
    ended = slurm.wait(slurm.train(tmp_path, undisturbed))
    log = Path(f"{undisturbed}.log").read_text()
    assert ended["JobState"] == "COMPLETED", log
    assert "ended with exit code 0" in log

    job = slurm.train(tmp_path, disturbed)
    slurm.wait_for_step(job, disturbed, 20)
    slurm.command("scancel", "--signal=USR1", job)  # as --signal=USR1@300 does: to the steps, not to the script
    slurm.wait_for_step(job, disturbed, train_rows(disturbed)[-1]["step"] + 40)
    # A job of a higher partition takes the nodes: SIGTERM, and a minute to save.
    slurm.command("sbatch", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true")
    ended = slurm.wait(job)
    log = Path(f"{disturbed}.log").read_text()
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "2"), log
    said = Path(f"{disturbed}-{job}", "0.log").read_text()
    assert [name for name in ("SIGUSR1 received", "SIGTERM received") if name not in said] == []
    assert said.count("resumed  after step") == 2
    assert computed(disturbed) == computed(undisturbed)
    assert len(train_rows(disturbed)) == STEPS


def test_another_exit_code_is_passed_on(slurm: Slurm, tmp_path: Path) -> None:
    job = slurm.train(tmp_path / "no corpus", tmp_path / "run")
    ended = slurm.wait(job)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "2:0", "0")
