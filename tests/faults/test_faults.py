"""Runs that break: each ends or goes on as documented, says why, and loses no more than its last checkpoint kept.

Two ranks (four where a node is lost) of a tiny model, 24 steps, a checkpoint every 5; the fault comes at step 13.
Nobody ends the ranks from outside: what they do is their own.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from support import faults
from support.command_line import SETTINGS, losses, train_rows
from support.faults import When, fault_time
from support.nodes import joined_nodes
from support.ranks import PRETRAIN, Ranks

from megazebra.launch import HANG_EXIT_CODE, REQUEUE_EXIT_CODE, USER_ERROR_EXIT_CODE
from megazebra.supervise.progress import made_step, saved_step

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]

STEPS, INTERVAL, FAULT = 24, 5, 13
SAVED = FAULT - FAULT % INTERVAL
HANG_S = 8
FAILED = 1
KILLED = -9
Record = Callable[..., None]


@dataclass
class Run:
    """A run in `folder`, as `start` begins it."""

    folder: Path
    corpus: Path
    record: Record

    @property
    def dir(self) -> Path:
        return self.folder / "run"

    def when(self, *ranks: int, last: int = FAULT) -> When:
        return When(self.folder, range(FAULT, last + 1), ranks or None)

    def start(self, *options: str, fault: Callable[[], None] | None = None, ranks: int = 2) -> Ranks:
        arguments = [
            str(PRETRAIN), *SETTINGS, f"--train.steps={STEPS}", f"--checkpoint.interval={INTERVAL}",
            "--train.micro_batch_size=1", "--validation.interval=0", "--train.guard.history=16",
            # Which checkpoint is complete at the fault must not depend on how busy the machine is.
            "--checkpoint.asynchronous=false",
            f"--data.path={self.corpus}/train", f"--run.dir={self.dir}", *options,
        ]  # fmt: skip
        return Ranks(arguments, self.folder / "output.txt", ranks=ranks, faults=[fault] if fault else [])

    def broken(self, *options: str, fault: Callable[[], None], ranks: int = 2) -> Outcome:
        """The run until all of its ranks have ended."""
        running = self.start(*options, fault=fault, ranks=ranks)
        codes = running.end()
        return Outcome(codes, running.output, time.time() - fault_time(self.folder))

    def resume(self) -> str:
        """Start the same command again; it has to reach the end. Returns what it said."""
        running = self.start()
        assert running.end() == [0, 0], running.output
        return running.output

    def note(self, fault: str, expected: str, outcome: Outcome, observed: str, *, ends: bool = True) -> None:
        lost = made_step(self.dir) - saved_step(self.dir) if self.dir.exists() else FAULT
        codes = ", ".join("stopped" if code is None else str(code) for code in outcome.codes)
        seen = f"exit codes {codes}; {observed}".replace(f"{self.folder}/", "")
        self.record(fault, expected, seen, lost, outcome.seconds if ends else None)


@dataclass(frozen=True)
class Outcome:
    """codes: of the ranks, None for a stopped one. seconds: from the fault to the end of all."""

    codes: list[int | None]
    output: str
    seconds: float

    def sentence(self, pattern: str) -> str:
        """The line that gives the cause."""
        match = re.search(f"^.*{pattern}.*$", self.output, re.MULTILINE)
        assert match, f"no {pattern!r} in\n{self.output}"
        return match[0].strip()


@pytest.fixture
def run(tmp_path: Path, corpus: Path, record: Record) -> Run:
    return Run(tmp_path, corpus, record)


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> list[tuple[int, float]]:
    """The losses of a run to which nothing happens."""
    run = Run(tmp_path_factory.mktemp("undisturbed"), corpus, lambda *fields: None)
    run.resume()
    return losses(run.dir)


def last_step_saved(run: Run) -> bool:
    return saved_step(run.dir) == SAVED


def test_a_rank_is_killed(run: Run, undisturbed: list[tuple[int, float]]) -> None:
    outcome = run.broken(fault=partial(faults.kill, run.when(1)))
    assert outcome.codes == [FAILED, KILLED]
    sentence = outcome.sentence("lost the connection to another rank")
    run.note("rank 1 gets SIGKILL", "the other rank names a lost connection and ends", outcome, sentence)
    assert last_step_saved(run)
    assert f"resumed  after step {SAVED}" in run.resume()
    assert losses(run.dir) == undisturbed


def test_a_node_is_lost(run: Run) -> None:
    outcome = run.broken("--train.global_batch_size=8", fault=partial(faults.kill, run.when(2, 3)), ranks=4)
    assert outcome.codes == [FAILED, FAILED, KILLED, KILLED]
    sentence = outcome.sentence("rank 0 lost the connection to another rank")
    run.note("ranks 2 and 3 of 4, a node, get SIGKILL", "the other node's ranks end likewise", outcome, sentence)
    assert last_step_saved(run)


def test_the_network_breaks(run: Run, undisturbed: list[tuple[int, float]]) -> None:
    outcome = run.broken(fault=partial(faults.cut_network, run.when(1)))
    assert outcome.codes == [FAILED, FAILED]
    sentence = outcome.sentence("rank 0 lost the connection to another rank")
    run.note("all connections of rank 1 break", "both ranks name a lost connection and end", outcome, sentence)
    assert "rank 1 lost the connection" in outcome.output
    assert last_step_saved(run)
    run.resume()
    assert losses(run.dir) == undisturbed


def test_packets_are_lost(run: Run) -> None:
    """TCP would send again for a quarter of an hour: no error ends this run, on either node."""
    with joined_nodes():
        hang = f"--train.hang_timeout_s={HANG_S}"
        outcome = run.broken(hang, fault=partial(faults.unplug, run.when(1)))
    assert outcome.codes == [HANG_EXIT_CODE, HANG_EXIT_CODE]
    sentence = outcome.sentence("ranks 0-1 are in all_reduce")
    run.note("the cable between two nodes is pulled", f"the watchdog ends both after {HANG_S} s", outcome, sentence)
    assert last_step_saved(run)


def test_a_rank_is_stopped(run: Run) -> None:
    hang = f"--train.hang_timeout_s={HANG_S}"
    outcome = run.broken(hang, fault=partial(faults.stop, run.when(1)))
    assert outcome.codes == [HANG_EXIT_CODE, None]
    sentence = outcome.sentence("rank 1 does not answer")
    run.note("rank 1 gets SIGSTOP", f"the watchdog ends the run after {HANG_S} s; rank 1 is silent", outcome, sentence)
    assert f"rank 0 is in all_reduce (valid_tokens) [step {FAULT}]" in outcome.output
    assert not (run.dir / "stacks" / "rank_1.txt").exists()
    assert last_step_saved(run)


@pytest.mark.parametrize(
    ("fault", "where", "phase"),
    [
        (faults.wait_forever, r"rank 1 is in _train \(megazebra/train/loop.py:\d+\), which is in _wait_forever",
         f"step {FAULT}"),
        (faults.read_forever, r"rank 1 is in next_step \(megazebra/data/prefetch.py:\d+\); data_0 in .*_wait_forever",
         f"step {FAULT}"),
    ],
    ids=["in the step", "in the data thread"],
)  # fmt: skip
def test_a_rank_waits_for_ever(run: Run, fault: Callable[[When], None], where: str, phase: str) -> None:
    outcome = run.broken(f"--train.hang_timeout_s={HANG_S}", fault=partial(fault, run.when(1)))
    assert outcome.codes == [HANG_EXIT_CODE, HANG_EXIT_CODE]
    sentence = outcome.sentence(where)
    what = fault.__name__.replace("_", " ")
    run.note(
        f"rank 1: {what}", f"the watchdog ends the run after {HANG_S} s and says where ranks are", outcome, sentence
    )
    assert f"[{phase}]" in sentence
    assert "_wait_forever" in (run.dir / "stacks" / "rank_1.txt").read_text()
    assert "all_reduce" in (run.dir / "stacks" / "rank_0.txt").read_text()
    assert last_step_saved(run)


def test_a_rank_waits_for_ever_while_saving(run: Run) -> None:
    """Files may take five times as long as a step."""
    when = When(run.folder, range(SAVED, SAVED + 1), (1,))
    outcome = run.broken("--train.hang_timeout_s=3", fault=partial(faults.write_forever, when))
    assert outcome.codes == [HANG_EXIT_CODE, HANG_EXIT_CODE]
    sentence = outcome.sentence(rf"rank 1 is in .*_wait_forever.* \[saving step {SAVED}\]")
    run.note("rank 1: write forever", "the watchdog ends the run", outcome, sentence)
    assert saved_step(run.dir) == SAVED - INTERVAL


def test_one_update_is_not_a_number(run: Run, undisturbed: list[tuple[int, float]]) -> None:
    outcome = run.broken(fault=partial(faults.scale_loss, run.when(1), float("nan")))
    assert outcome.codes == [0, 0]
    skipped = [row for row in train_rows(run.dir) if "skipped" in row]
    assert [row["step"] for row in skipped] == [FAULT]
    assert "nan" in skipped[0]["skipped"]
    run.note("NaN in one step on rank 1", "the update is skipped on all ranks", outcome,
             f"skipped: {skipped[0]['skipped']}, {skipped[0]['samples']}", ends=False)  # fmt: skip
    assert losses(run.dir)[: FAULT - 1] == undisturbed[: FAULT - 1]


def test_every_update_is_not_a_number(run: Run) -> None:
    outcome = run.broken(fault=partial(faults.scale_loss, run.when(1, last=STEPS), float("nan")))
    assert outcome.codes == [USER_ERROR_EXIT_CODE, USER_ERROR_EXIT_CODE]
    sentence = outcome.sentence("5 updates in a row were skipped; last reason: loss is nan; last batch: samples")
    run.note("NaN in every step from 13 on", "the run ends after 5 skips, names the samples", outcome, sentence)
    assert saved_step(run.dir) == 15, "the save of step 15, whose weights are those of step 12, was under way"


def test_the_loss_jumps(run: Run) -> None:
    outcome = run.broken(fault=partial(faults.scale_loss, run.when(), 50.0))
    assert outcome.codes == [0, 0]
    skipped = [row for row in train_rows(run.dir) if "skipped" in row]
    assert [row["step"] for row in skipped] == [FAULT]
    assert "is a spike" in skipped[0]["skipped"]
    run.note("the loss is 50 times as large in one step", "the update is skipped", outcome,
             f"skipped: {skipped[0]['skipped']}", ends=False)  # fmt: skip


def test_a_token_is_outside_of_the_vocabulary(run: Run, tmp_path: Path) -> None:
    """Under the run's eyes: the file is overwritten when half of it is read."""
    prefix = tmp_path / "corpus" / "train"
    prefix.parent.mkdir()
    for suffix in (".bin", ".idx", ".meta.json"):
        (prefix.parent / f"train{suffix}").write_bytes((run.corpus / f"train{suffix}").read_bytes())

    outcome = run.broken(
        f"--data.path={prefix}", fault=partial(faults.do, run.when(1), partial(overwrite_tokens, prefix))
    )
    assert outcome.codes.count(USER_ERROR_EXIT_CODE) >= 1, outcome.output
    sentence = outcome.sentence(
        r"error: .*corpus/train.bin: document \d+ has token id 600 at position \d+, outside the vocabulary"
    )
    run.note("token ids beyond the vocabulary in .bin", "the run names the file, the document and the token", outcome,
             sentence)  # fmt: skip
    assert saved_step(run.dir) >= SAVED, "some steps were read ahead"


def overwrite_tokens(prefix: Path) -> None:
    path = Path(f"{prefix}.bin")
    with path.open("r+b") as file:
        file.write(np.full(path.stat().st_size // 2, 600, np.uint16).tobytes())


def test_the_disk_is_full_while_saving(run: Run, small_disk: Path) -> None:
    run.dir.symlink_to(small_disk)
    fault = partial(faults.do, run.when(0), partial(fill, small_disk))
    outcome = run.broken("--checkpoint.asynchronous=true", fault=fault)
    assert outcome.codes == [USER_ERROR_EXIT_CODE, USER_ERROR_EXIT_CODE], outcome.output
    sentence = outcome.sentence("No space left on device")
    run.note(
        "the disk is full while step 15 is saved", "all ranks end; the older checkpoint is whole", outcome, sentence
    )
    assert last_step_saved(run)
    assert not list(small_disk.glob("checkpoints/*.partial*"))
    (small_disk / "filler").unlink()
    assert f"resumed  after step {SAVED}" in run.resume()


def fill(disk: Path) -> None:
    """Up to what the metrics need."""
    free = os.statvfs(disk)
    (disk / "filler").write_bytes(bytes(free.f_bavail * free.f_frsize - 64_000))


def test_the_disk_is_full_while_writing_metrics(run: Run) -> None:
    outcome = run.broken(fault=partial(faults.fill_disk_of_metrics, run.when(0)))
    assert outcome.codes == [USER_ERROR_EXIT_CODE, FAILED], outcome.output
    sentence = outcome.sentence(r"error: \[Errno 28\] No space left on device: .*metrics.jsonl")
    run.note("the disk is full when a row is written", "the run names the file and ends", outcome, sentence)
    assert last_step_saved(run)


def test_the_run_folder_is_read_only(run: Run, small_disk: Path) -> None:
    """A run that holds a file open there keeps the system from making it so: it is at the start."""
    run.dir.symlink_to(small_disk)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    started = time.time()
    running = run.start()
    outcome = Outcome(running.end(), running.output, time.time() - started)
    assert outcome.codes == [USER_ERROR_EXIT_CODE, FAILED], outcome.output
    sentence = outcome.sentence(r"error: \[Errno 30\] Read-only file system: .*run/config.yaml")
    run.note("the run folder is read-only", "the run names the file before the first step", outcome, sentence)


def test_the_run_folder_is_deleted(run: Run) -> None:
    outcome = run.broken(fault=partial(faults.do, run.when(0), partial(shutil.rmtree, run.dir)))
    assert outcome.codes == [USER_ERROR_EXIT_CODE, FAILED], outcome.output
    sentence = outcome.sentence(r"error: .*was deleted while the run goes on: .*metrics.jsonl")
    run.note("the run folder is deleted", "the run says so at its next row and ends", outcome, sentence)


def test_a_rank_is_slow(run: Run) -> None:
    outcome = run.broken("--train.steps=48", fault=partial(faults.slow, When(run.folder, range(FAULT, 49), (1,)), 0.3))
    assert outcome.codes == [0, 0]
    sentence = outcome.sentence("rank 1 is slow")
    run.note("rank 1 takes 0.3 s longer from step 13 on", "the run goes on and names the rank", outcome, sentence,
             ends=False)  # fmt: skip
    slowest = [row["slowest_rank"] for row in train_rows(run.dir)[FAULT:]]
    assert slowest.count(1) > 0.9 * len(slowest)


@pytest.mark.parametrize("on_damage", ["stop", "go_back"])
def test_the_newest_checkpoint_is_damaged(run: Run, undisturbed: list[tuple[int, float]], on_damage: str) -> None:
    run.broken(fault=partial(faults.kill, run.when(1)))
    damaged = next((run.dir / "checkpoints" / f"step_{SAVED:08d}").glob("*.safetensors"))
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    started = time.time()
    running = run.start(f"--checkpoint.on_damage={on_damage}")
    codes = running.end()
    outcome = Outcome(codes, running.output, time.time() - started)
    if on_damage == "stop":
        assert codes == [USER_ERROR_EXIT_CODE, USER_ERROR_EXIT_CODE], running.output
        sentence = outcome.sentence(f"{damaged.name} is damaged")
        run.note("a bit of the newest checkpoint is flipped", "on_damage=stop: names the file, ends", outcome, sentence)
        return
    assert codes == [0, 0], running.output
    run.note("a bit of the newest checkpoint is flipped", "on_damage=go_back: the run goes on from the one before",
             outcome, outcome.sentence("went back to"), ends=False)  # fmt: skip
    assert f"resumed  after step {SAVED - INTERVAL}" in running.output
    assert losses(run.dir) == undisturbed


def test_a_run_is_asked_to_stop_while_it_waits_for_a_rank(run: Run) -> None:
    """At the start, in C++, where Python runs no handlers."""
    running = run.start(fault=partial(faults.never_start, 1))
    while not running.listens:
        time.sleep(0.1)
    asked, (first, second) = time.time(), running.processes
    first.terminate()
    first.join(60)
    second.kill()
    assert first.exitcode == REQUEUE_EXIT_CODE, running.output
    assert "SIGTERM received before training has begun" in running.output
    run.record("SIGTERM while rank 0 waits for rank 1 to connect", "it ends at once with 85",
               f"exit code {first.exitcode}", 0, time.time() - asked)  # fmt: skip


def test_a_rank_is_asked_to_stop(run: Run, undisturbed: list[tuple[int, float]]) -> None:
    outcome = run.broken(fault=partial(faults.terminate, run.when(1)))
    assert outcome.codes == [REQUEUE_EXIT_CODE, REQUEUE_EXIT_CODE], outcome.output
    sentence = outcome.sentence(f"SIGTERM received: stopped after step {FAULT}")
    run.note("rank 1 gets SIGTERM", "all make the step, save it and end with 85", outcome, sentence)
    assert saved_step(run.dir) == FAULT
    run.resume()
    assert losses(run.dir) == undisturbed
