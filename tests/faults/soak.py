"""A long run that is killed again and again, and one that is left alone: both must end with the same parameters.

    python tests/faults/soak.py                        2,000 steps, a kill about every 100 (make soak)
    python tests/faults/soak.py --steps 200 --kill-every 40

tools/supervise.py starts the killed run again. What is killed, a rank or the launcher, and when are random (--seed). Of
the run that is left alone memory and open files of its ranks are measured; of the killed one those of the supervisor.
Prints the numbers, and ends with 1 where the parameters differ or something grows.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.command_line import ROOT, SETTINGS, environment

from megazebra.data.corpus.corpus_writer import CorpusWriter
from megazebra.supervise.progress import made_step
from megazebra.supervise.supervisor import RECORD

LAUNCHER = f"{sys.executable} {ROOT}/tests/support/fork_launcher.py {{ranks}} {{port}}"
RANKS = 2
# The second half of a run may take this much more than the first: pages that malloc keeps, whatever the steps.
LEEWAY_BYTES = 8 << 20


@dataclass
class Usage:
    """Resident bytes and open files of processes, by the step at which they were measured."""

    resident: dict[int, int] = field(default_factory=dict)
    files: dict[int, int] = field(default_factory=dict)

    def measure(self, step: int, pids: list[int]) -> None:
        with suppress(OSError):  # one of them has ended
            resident = sum(_resident_bytes(pid) for pid in pids)
            files = sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in pids)
            self.resident[step], self.files[step] = resident, files

    def halves(self, counts: dict[int, int]) -> tuple[int, int]:
        """The median of the second quarter, before which things are still being set up, and that of the second half: a
        checkpoint that is being written has files open for a moment."""
        last = max(counts)
        early = [count for step, count in counts.items() if last / 4 < step <= last / 2]
        late = [count for step, count in counts.items() if step > last / 2]
        return statistics.median_low(early), statistics.median_low(late)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--kill-every", type=int, default=100, help="on average (default: 100 steps)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="megazebra-soak-") as name:
        folder = Path(name)
        with CorpusWriter(folder / "train", vocab_size=512) as writer:
            for stride in (1, 3, 5, 7):
                writer.add_document([token * stride % 512 for token in range(65536)])
        supervisor, ranks = Usage(), Usage()
        started = time.monotonic()
        run(folder, "alone", options.steps, 0, lambda step, job: ranks.measure(step, rank_pids(job)))
        alone_s = time.monotonic() - started
        kills = Kills(random.Random(options.seed), options.kill_every)

        def disturb(step: int, job: subprocess.Popen[bytes]) -> None:
            supervisor.measure(step, [job.pid])
            kills.maybe(step, job)

        run(folder, "killed", options.steps, 10 * options.steps // options.kill_every, disturb)
        seconds = time.monotonic() - started - alone_s
        starts = [json.loads(line) for line in (folder / "killed" / RECORD).read_text().splitlines()]
        same = parameters(folder / "alone") == parameters(folder / "killed")
    kinds = ", ".join(f"{count} of {what}" for what, count in kills.of.items())
    again = sum(start["made_step"] - start["saved_step"] for start in starts)
    print(f"{options.steps} steps on {RANKS} ranks: alone {alone_s:.0f} s; {sum(kills.of.values())} kills ({kinds}), "
          f"{len(starts)} starts and {again} steps made again, {seconds:.0f} s")  # fmt: skip
    print(f"parameters and moments of step {options.steps}: {'bit for bit the same' if same else 'DIFFERENT'}")
    flat = all([report("ranks of the run left alone", ranks), report("supervisor of the killed run", supervisor)])
    sys.exit(0 if same and flat else 1)


class Kills:
    """Kills a rank or the launcher when a step is reached that is drawn anew each time."""

    def __init__(self, randomness: random.Random, every: int) -> None:
        self._random, self._every = randomness, every
        self._next = self._draw(0)
        self.of = {"a rank": 0, "the launcher": 0}

    def _draw(self, step: int) -> int:
        return step + self._random.randint(self._every // 2, 3 * self._every // 2)

    def maybe(self, step: int, job: subprocess.Popen[bytes]) -> None:
        processes = session(job)
        if step < self._next or len(processes) < 1 + RANKS:  # they are just ending, or starting
            return
        launcher, *ranks = processes
        victim = self._random.choice([launcher, *ranks])
        with suppress(ProcessLookupError):
            os.kill(victim, signal.SIGKILL)
            self.of["the launcher" if victim == launcher else "a rank"] += 1
            self._next = self._draw(step)


def run(
    folder: Path, name: str, steps: int, restarts: int, each_step: Callable[[int, subprocess.Popen[bytes]], None]
) -> None:
    """Under the supervisor, to its end; `each_step` is called when a step is seen that was not made before."""
    run_dir = folder / name
    command = [
        sys.executable, str(ROOT / "tools" / "supervise.py"), f"--ranks={RANKS}", "--pause-s=0.1",
        f"--max-restarts={restarts}", "--launch", LAUNCHER, "--", str(ROOT / "pretrain_zebra.py"), *SETTINGS,
        f"--train.steps={steps}", "--checkpoint.interval=25", "--validation.interval=0", "--logging.interval=100",
        "--train.micro_batch_size=1", "--train.global_batch_size=2", f"--data.path={folder}/train",
        f"--run.dir={run_dir}",
    ]  # fmt: skip
    log = folder / f"{name}.txt"
    with log.open("w") as output:
        job = subprocess.Popen(command, env=environment(), cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
        seen = 0
        while job.poll() is None:
            time.sleep(0.2)
            step = made_step(run_dir)
            if step > seen:
                seen = step
                each_step(step, job)
    if job.returncode:
        sys.exit(f"{name} ended with {job.returncode}:\n{log.read_text()[-4000:]}")


def parameters(run_dir: Path) -> dict[str, bytes]:
    newest = run_dir / "checkpoints" / (run_dir / "checkpoints" / "latest").read_text().strip()
    return {path.name: path.read_bytes() for path in newest.glob("*.safetensors")}


def session(job: subprocess.Popen[bytes]) -> list[int]:
    """The launcher, then its ranks."""
    launchers = list(children(job.pid))
    return launchers + [rank for launcher in launchers for rank in children(launcher)]


def rank_pids(job: subprocess.Popen[bytes]) -> list[int]:
    return session(job)[1:]


def children(pid: int) -> Iterator[int]:
    with suppress(OSError):
        yield from map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())


def report(what: str, usage: Usage) -> bool:
    """Prints the usage; whether it is flat."""
    memory, files = usage.halves(usage.resident), usage.halves(usage.files)
    flat = memory[1] - memory[0] < LEEWAY_BYTES and files[1] <= files[0]
    print(f"{what}: memory {memory[0] / 1e6:.1f} MB, then {memory[1] / 1e6:.1f} MB; open files {files[0]}, then "
          f"{files[1]}{'' if flat else ': GROWS'}")  # fmt: skip
    return flat


def _resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    main()
