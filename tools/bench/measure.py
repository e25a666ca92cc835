"""Sides measured in turns, clocks, the allocator, peak memory, tables and JSON: what all tools/bench_*.py share."""

from __future__ import annotations

import argparse
import ctypes
import json
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

Row = tuple[str, float, str]  # key, number, what it means
Clock = Callable[[Callable[[], Any]], float]  # seconds that a call takes
Side = TypeVar("Side", bound=Hashable)
Result = TypeVar("Result")

# glibc gives large blocks back to the kernel at once, and every call pays for their pages again.
TUNED_GLIBC = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(16 * 2**30)}


def cpu_seconds(run: Callable[[], Any]) -> float:
    """Of all threads together: comparable between sides that use one thread, whatever else the machine does."""
    started = time.process_time()
    run()
    return time.process_time() - started


def wall_seconds(run: Callable[[], Any]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def interleaved(sides: Mapping[Side, Callable[[], Any]], rounds: int, clock: Clock = cpu_seconds) -> dict[Side, float]:
    """Median seconds of every side, run in turns after one run of each to warm up."""
    seconds: dict[Side, list[float]] = {name: [] for name in sides}
    for turn in range(rounds + 1):
        for name, run in sides.items():
            took = clock(run)
            if turn:
                seconds[name].append(took)
    return {name: statistics.median(values) for name, values in seconds.items()}


def tune_allocator() -> str:
    """Start this program again with glibc's allocator keeping its memory, for all sides; returns a line that says so.

    Call it first: the allocator reads its settings when a process starts.
    """
    if platform.libc_ver()[0] != "glibc":
        return "as the system has it"
    if not all(os.environ.get(name) == value for name, value in TUNED_GLIBC.items()):
        sys.stdout.flush()
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **TUNED_GLIBC})
    return "glibc, " + " ".join(f"{name}={value}" for name, value in TUNED_GLIBC.items()) + " for all sides"


def machine() -> str:
    import torch  # not every bench needs it

    return f"{cpu_name()}, {os.cpu_count()} cores; torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}"


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def peak_bytes(run: Callable[[], Any]) -> int:
    """Bytes of resident memory that `run` adds at its peak, whoever allocates them. Linux only (OSError elsewhere)."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)  # what is free but still resident would be used again without being seen
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far becomes what is resident now
    before = _resident_bytes("VmRSS")
    run()
    return _resident_bytes("VmHWM") - before


def _resident_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def in_fresh_process(function: Callable[..., Result], *arguments: Any) -> Result:
    """The function's result from a process that holds nothing else; function and arguments must be picklable."""
    with ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def command_line(description: str | None, benches: Iterable[str]) -> argparse.ArgumentParser:
    """The options that all benches have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(benches), action="append", help="one of the benches; repeatable")
    parser.add_argument("--quick", action="store_true", help="smaller inputs, fewer rounds: less than a minute")
    parser.add_argument("--json", metavar="FILE", help="write the numbers as one flat object")
    return parser


def report(
    benches: Mapping[str, Callable[[], Iterable[Row]]], only: Sequence[str] | None, json_file: str | None
) -> None:
    """Run the benches, print their rows as they come, and write them to the file where one is given."""
    results: dict[str, float] = {}
    for name in only or benches:
        print(f"\n{name}", flush=True)
        for key, number, meaning in benches[name]():
            results[key] = float(number)
            print(f"  {key:28} {number:14,.4g}  {meaning}", flush=True)
    if json_file:
        Path(json_file).write_text(json.dumps(results, indent=1) + "\n")
