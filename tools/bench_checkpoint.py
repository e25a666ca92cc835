"""Measure checkpoints against copying the same bytes with `cp`, both in turns: saving, loading, waiting, merging.

    python tools/bench_checkpoint.py --dir /data    # minutes; --quick, with a smaller model, takes one

One process trains a step of AdamW in float32 under DeepSpeed: a layer of Llama-2-7B's and a small vocabulary, 2.6 GB
of weights and moments. It takes four times as much memory, and three times as much disk under --dir. Wall time, medians
over rounds after one that is not counted; the disk has written all that was before when a turn begins.
  save   a synchronous save (copy in memory, files, fsync, checksums, rename) against `cp -r` from the page cache and
         fsync; on a file system where `cp` shares blocks (btrfs, XFS), that copies nothing
  load   resuming, every file compared with its checksum before it is used, against `cp -r` without fsync: the files on
         the disk only, or (_cached) in the page cache; and the memory that resuming adds to the engine's at its peak
  async  what training waits for: a synchronous save, and an asynchronous one until it is complete, beside
         steps that sleep
  merge  memory that merging with all moments in float32 adds at its peak, in a process of its own
A ratio says how many times more bytes per second ours moves, or how many times less training waits.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from math import prod
from pathlib import Path

import torch
from bench.checkpoint_setting import Setting, saved_setting
from bench.measure import Row, command_line, in_fresh_process, machine, peak_bytes, report, wall_seconds
from bench.scratch import scratch_folder

from megazebra.checkpoint.manager import Checkpoints, Progress
from megazebra.checkpoint.merge import Merge
from megazebra.checkpoint.reader import TrainingCheckpoint
from megazebra.durable import file_crc32

STEP_S = 0.02  # of the training beside which is saved: a sleep
MAX_FILE_BYTES = 5 * 10**9
QUICK = {"hidden": 1024, "rounds": 2}


def bench_save(setting: Setting) -> Iterator[Row]:
    save = partial(setting.checkpoints(setting.turn).save, Progress())
    seconds = setting.in_turns(
        {"ours": partial(wall_seconds, save), "cp": partial(cached, setting, setting.copy_synced)}
    )
    yield from against_cp(setting, "save", seconds["ours"], seconds["cp"], "copied, written, synced and checksummed")


def bench_load(setting: Setting) -> Iterator[Row]:
    resume = setting.checkpoints(setting.saved.parents[1]).resume
    for key, clock in {"load": uncached, "load_cached": cached}.items():
        seconds = setting.in_turns(
            {"ours": partial(clock, setting, resume), "cp": partial(clock, setting, setting.copy)}
        )
        yield from against_cp(setting, key, seconds["ours"], seconds["cp"], "verified and in the engine's buffers")
    peak = peak_bytes(resume)
    yield "load_peak_bytes", peak, f"{peak / 1e6:,.0f} MB beside the engine's buffers"


def cached(setting: Setting, run: Callable[[], object]) -> float:
    """Wall seconds with the saved files in the page cache."""
    for file in setting.saved.iterdir():
        file_crc32(file)
    return wall_seconds(run)


def uncached(setting: Setting, run: Callable[[], object]) -> float:
    for file in setting.saved.iterdir():
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return wall_seconds(run)


def against_cp(setting: Setting, key: str, ours: float, cp: float, what: str) -> Iterator[Row]:
    yield f"{key}_s", ours, f"{setting.bytes / ours / 1e9:.2f} GB/s: {what}"
    yield f"{key}_cp_s", cp, f"{setting.bytes / cp / 1e9:.2f} GB/s"
    yield f"{key}_vs_cp", cp / ours, "bytes per second, ours / cp"


def bench_async(setting: Setting) -> Iterator[Row]:
    sides = {name: setting.checkpoints(setting.turn, asynchronous=name == "async") for name in ("sync", "async")}
    seconds = setting.in_turns({name: partial(stalled_seconds, checkpoints) for name, checkpoints in sides.items()})
    yield "stall_sync_s", seconds["sync"], "training waits until it is on the disk"
    yield "stall_async_s", seconds["async"], "it waits for the copy in memory, the interpreter, the rename"
    yield "async_stall_vs_sync", seconds["sync"] / seconds["async"], "times less that training waits"


def stalled_seconds(checkpoints: Checkpoints) -> float:
    """What one checkpoint keeps training from: `save`, the calls between steps until it is complete, and what a step
    waits for the interpreter while the thread that writes holds it.
    """
    started = time.perf_counter()
    complete = checkpoints.save(Progress())
    stalled = time.perf_counter() - started
    while not complete:
        started = time.perf_counter()
        time.sleep(STEP_S)
        complete = checkpoints.completed()
        stalled += time.perf_counter() - started - STEP_S
    return stalled


def bench_merge(setting: Setting) -> Iterator[Row]:
    checkpoint = TrainingCheckpoint.open(setting.saved)
    largest = max(prod(checkpoint.shape(name)) * torch.float32.itemsize for name in checkpoint.names)
    setting.clear()
    peak = in_fresh_process(peak_of_merging, setting.saved, setting.turn / "merged")
    yield "merge_peak_bytes", peak, f"{peak / 1e6:,.0f} MB"
    yield "merge_largest_bytes", largest, f"{largest / 1e6:,.0f} MB, the largest tensor"
    yield "merge_peak_over_largest", peak / largest, "one tensor at a time, whatever the model's size"


def peak_of_merging(saved: Path, output: Path) -> int:
    def merge() -> None:
        Merge(TrainingCheckpoint.open(saved), output, torch.float32, with_optimizer=True).write(MAX_FILE_BYTES)

    return peak_bytes(merge)


BENCHES = {"save": bench_save, "load": bench_load, "async": bench_async, "merge": bench_merge}


def main() -> None:
    parser = command_line(__doc__, BENCHES)
    parser.add_argument("--dir", metavar="FOLDER", help="where the files go (default: the system's temporary folder)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each side")
    parser.add_argument("--hidden", type=int, default=4096, help="width of the model")
    parser.add_argument("--vocab", type=int, default=2048)
    if parser.parse_known_args()[0].quick:
        parser.set_defaults(**QUICK)
    parsed = parser.parse_args()
    print(f"machine    {machine()}")
    with (
        scratch_folder("bench_checkpoint", parsed.dir) as folder,
        saved_setting(folder, parsed.hidden, parsed.vocab, parsed.rounds) as setting,
    ):
        print(f"checkpoint {setting.bytes / 1e9:.2f} GB in {folder}")
        report({name: partial(bench, setting) for name, bench in BENCHES.items()}, parsed.only, parsed.json)


if __name__ == "__main__":
    main()
