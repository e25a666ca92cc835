"""Read files that have been made wrong: nothing may crash, hang or take memory for what a header claims.

    python tests/fuzz/fuzz_inputs.py --seconds 600                  all targets in turn
    python tests/fuzz/fuzz_inputs.py --cases 5000 --targets corpus
    python tests/fuzz/fuzz_inputs.py --targets corpus --seed 7 --first 123 --cases 1

Every case is a copy of a target's sound files (fuzz_targets.py), mutated by a generator of its own: target, seed and
number tell what it is. Reading it may end in an error that is a message to the user (launch.is_users), no other. Each
case's folder is kept where it does not (--keep). Cases run in processes that are forked for some hundred each: one that
dies is found out, too. Ends with 1 where there is a finding.
"""

from __future__ import annotations

import argparse
import ast
import collections
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from types import FrameType

import torch
from fuzz_targets import TARGETS, Target
from mutations import mutate

from megazebra.launch import is_users

CASE_SECONDS = 20  # a case takes milliseconds
EXTRA_MEMORY = 1 << 29  # bytes a case may ask for beyond what the process has
CHUNK = 200  # cases of one process


class TooLongError(Exception):
    pass


@dataclass
class Outcome:
    """cases: how many. errors: how often each type of error was raised that is one of ours. findings: the others, by
    number: what went wrong.
    """

    cases: int = 0
    errors: collections.Counter[str] = field(default_factory=collections.Counter)
    findings: dict[int, str] = field(default_factory=dict)

    def run(self, target: Target, sound: Path, case: Path, seed: int, number: int) -> bool:
        """Whether case `number` is as it should be; makes it in the folder `case`, which is replaced."""
        make_case(target, sound, case, seed, number)
        self.cases += 1
        try:
            with limits(), warnings.catch_warnings():
                warnings.simplefilter("error")
                warnings.simplefilter("ignore", RuntimeWarning)  # charts of numbers beyond what axes can hold
                target.read(case)
        except BaseException as error:
            if is_users(error):
                self.errors[type(error).__name__] += 1
                return True
            self.findings[number] = "".join(traceback.format_exception(error)[-3:])
            return False
        return True


def make_case(target: Target, sound: Path, case: Path, seed: int, number: int) -> None:
    shutil.rmtree(case, ignore_errors=True)
    shutil.copytree(sound, case)
    random = Random(f"{target.name} {seed} {number}")
    files = sorted(path for path in case.rglob("*") if path.is_file())
    for file in random.sample(files, random.choice([1, 1, 1, 2]) if len(files) > 1 else 1):
        file.write_bytes(mutate(file.name, file.read_bytes(), random))
    if target.seal is not None and random.random() < 0.6:
        target.seal(case)


@contextmanager
def limits() -> Iterator[None]:
    """Raise where the block takes too long, or too much memory: the address space may not grow much."""

    def too_long(signum: int, frame: FrameType | None) -> None:
        raise TooLongError(f"more than {CASE_SECONDS} s")

    before = signal.signal(signal.SIGALRM, too_long)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + EXTRA_MEMORY, hard))
    signal.setitimer(signal.ITIMER_REAL, CASE_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGALRM, before)


@contextmanager
def sound_files(target: Target) -> Iterator[Path]:
    """A folder whose `sound` has the target's files, which can be read."""
    with tempfile.TemporaryDirectory(prefix=f"fuzz-{target.name}-") as folder:
        sound = Path(folder, "sound")
        sound.mkdir()
        target.write(sound)
        shutil.copytree(sound, Path(folder, "case"))
        target.read(Path(folder, "case"))
        yield Path(folder)


def run_forked(target: Target, folder: Path, seed: int, numbers: range, keep: Path, deadline: float) -> Outcome:
    """The cases in a process of their own. One that dies leaves the number of the case at which it did."""
    result = folder / "result"
    result.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            outcome = Outcome()
            for number in numbers:
                (folder / "current").write_text(str(number))
                if not outcome.run(target, folder / "sound", folder / "case", seed, number):
                    _keep(folder / "case", keep / f"{target.name}-{seed}-{number}")
                if time.monotonic() > deadline:
                    break
            result.write_text(repr((outcome.cases, dict(outcome.errors), outcome.findings)))
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    if status == 0:
        cases, errors, findings = ast.literal_eval(result.read_text())
        return Outcome(cases, collections.Counter(errors), findings)
    number = int((folder / "current").read_text())
    _keep(folder / "case", keep / f"{target.name}-{seed}-{number}")
    died = f"the process died: signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else "the process ended"
    return Outcome(number - numbers.start + 1, collections.Counter(), {number: died})


def _keep(case: Path, kept: Path) -> None:
    shutil.rmtree(kept, ignore_errors=True)
    shutil.copytree(case, kept)


def fuzz(target: Target, seed: int, first: int, cases: int | None, seconds: float, keep: Path) -> Outcome:
    """Cases from `first` on, until there are as many as asked for or the time is over."""
    deadline = time.monotonic() + seconds
    total = Outcome()
    with sound_files(target) as folder:
        while time.monotonic() < deadline and (cases is None or total.cases < cases):
            start = first + total.cases
            count = CHUNK if cases is None else min(CHUNK, cases - total.cases)
            part = run_forked(target, folder, seed, range(start, start + count), keep, deadline)
            total.cases += part.cases
            total.errors += part.errors
            total.findings |= part.findings
    return total


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--seed", type=int, default=int(time.time()), help="default: the time")
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--cases", type=int, help="of each target (default: as many as the time allows)")
    parser.add_argument("--seconds", type=float, default=600, help="of all targets together")
    parser.add_argument("--keep", type=Path, default=Path("fuzz-findings"), help="where folders of findings are kept")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # threads do not survive a fork
    print(f"seed {options.seed}", flush=True)
    found = False
    for name in options.targets:
        share = options.seconds / len(options.targets)
        outcome = fuzz(TARGETS[name], options.seed, options.first, options.cases, share, options.keep)
        errors = ", ".join(f"{count} {kind}" for kind, count in outcome.errors.most_common())
        print(
            f"{name}: {outcome.cases} cases, {len(outcome.findings)} findings; refused: {errors or 'none'}", flush=True
        )
        for number, what in outcome.findings.items():
            found = True
            print(f"  {options.keep}/{name}-{options.seed}-{number}\n{what}", flush=True)
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
