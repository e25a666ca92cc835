"""The profiler's window: some steps of a run recorded by torch's profiler, as a trace and as a table of their parts.

Written to the run folder's `profile`, for each rank that profiles:
    steps_10-12.rank_0.trace.json.gz   for Perfetto or chrome://tracing; our parts are there as ranges
    steps_10-12.rank_0.json            first_step, last_step, rank, device; time: 'host' or 'device';
                                       seconds_per_step; parts: {name: seconds per step}
On CPUs the table has the host's time. On GPUs it has the time of the kernels that a part launches, which may overlap
each other: the sum can exceed the step. Never run on a GPU.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from megazebra.durable import errors_name, write_atomically
from megazebra.train.parts import REST, marked, part_marked, table
from megazebra.train.session import Session
from megazebra.train.watchdog import FILES_PATIENCE

_PREFIX = "part: "  # tells our ranges from those that torch and DeepSpeed make
_STEP = "step"


class Profiler:
    """`profile.steps` of this rank, if it is among `profile.ranks`. Told of every step before and after it."""

    def __init__(self, session: Session) -> None:
        options = session.config.profile
        self.session = session
        self.rank = session.mesh.world.rank
        self.records = self.rank in options.ranks
        self.speaks = self.rank == min(options.ranks, default=0)
        self.window = options.window
        self._running: _Recording | None = None

    def before(self, step: int) -> None:
        if self.window is None or not self.records or not self.window[0] <= step <= self.window[1]:
            return
        if self._running is None:
            self._running = _Recording(self.session, step)
        self._running.begin_step()

    def after(self, step: int) -> None:
        if self._running is not None:
            self._running.end_step()
        if self.window is not None and step == self.window[1]:
            # Ranks that did not record wait for those that did.
            self.session.watchdog.phase("writing the profile", patience=FILES_PATIENCE)
            self.close()

    def close(self) -> None:
        """Write down what was recorded, also where the stage or the run ends within the window."""
        recording, self._running = self._running, None
        if recording is None:
            return
        try:
            lines = recording.finish(Path(self.session.config.run.dir) / "profile", self.rank)
        except OSError as error:  # a full disk: nothing that training needs is lost
            lines = [f"the profile of rank {self.rank} is lost: {error}"]
        for line in lines:
            if self.session.reporter is not None:
                self.session.reporter.message(line)
            elif self.speaks:
                print(line, flush=True)


class _Recording:
    def __init__(self, session: Session, first_step: int) -> None:
        self.device = session.device
        self.first_step = first_step
        self.steps = 0
        cuda = [ProfilerActivity.CUDA] if self.device.type == "cuda" else []
        self._profile = profile(activities=[ProfilerActivity.CPU, *cuda], acc_events=True)
        self._ranges = _Ranges()
        self._marks = ExitStack()
        self._marks.enter_context(marked(session.engine, self._ranges))
        self._marks.enter_context(part_marked(session.loader, "next_step", "data", self._ranges))
        self._profile.start()

    def begin_step(self) -> None:
        self._ranges.enter(_STEP)

    def end_step(self) -> None:
        self._ranges.leave(_STEP)
        self.steps += 1

    def finish(self, folder: Path, rank: int) -> list[str]:
        """Stops, writes trace and table, and gives the lines to show."""
        self._marks.close()
        self._profile.stop()
        last_step = self.first_step + self.steps - 1
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"steps_{self.first_step}-{last_step}.rank_{rank}.json"
        trace = _export(self._profile, path.with_suffix(".trace.json.gz"))
        on_device = self.device.type == "cuda"
        seconds = seconds_of_parts(self._profile.events() or (), on_device=on_device)
        content = {
            "first_step": self.first_step,
            "last_step": last_step,
            "rank": rank,
            "device": self.device.type,
            "time": "device" if on_device else "host",
            "seconds_per_step": sum(seconds.values()) / self.steps,
            "parts": {part: s / self.steps for part, s in sorted(seconds.items(), key=lambda item: -item[1])},
        }
        write_atomically(path, json.dumps(content, indent=2).encode())
        title = f"profile of steps {self.first_step} to {last_step} on rank {rank}, {content['time']} time: {trace}"
        return [title, *(f"  {line}" for line in table(seconds, self.steps))]


class _Ranges:
    """A watcher that makes every part a range of the profiler, from the beginning of a step to its end."""

    def __init__(self) -> None:
        self._open: list[Any] = []

    def enter(self, part: str) -> None:
        if not self._open and part != _STEP:  # between steps: a collective of validation, or of the loop itself
            return
        opened = record_function(_PREFIX + part)
        opened.__enter__()
        self._open.append(opened)

    def leave(self, part: str) -> None:
        if self._open:
            self._open.pop().__exit__(None, None, None)


def seconds_of_parts(events: Iterable[Any], *, on_device: bool) -> dict[str, float]:
    """Seconds of each part in all steps together, from the profiler's events; of parts within parts, the inner one's.

    on_device: time of kernels in place of the host's.
    """
    seconds: dict[str, float] = defaultdict(float)
    kernels = 0.0
    for event in events:
        if event.device_type != torch.autograd.DeviceType.CPU:
            continue
        kernels += event.self_device_time_total * 1e-6
        if event.name.startswith(_PREFIX):
            took = (event.device_time_total if on_device else event.cpu_time_total) * 1e-6
            seconds[event.name] += took
            if outer := _part_around(event):
                seconds[outer] -= took
    rest = seconds.pop(_PREFIX + _STEP, 0.0)
    parts = {name.removeprefix(_PREFIX): s for name, s in seconds.items()}
    # A GPU's backward runs in a thread of its own, outside the range of the step.
    parts[REST] = kernels - sum(parts.values()) if on_device else rest
    return parts


def _part_around(event: Any) -> str | None:
    outer = event.cpu_parent
    while outer is not None and not outer.name.startswith(_PREFIX):
        outer = outer.cpu_parent
    return None if outer is None else str(outer.name)


def _export(recorded: profile, path: Path) -> Path:
    """The trace, whole or not at all; the profiler compresses what is named so."""
    partial = path.with_name(f"partial.{path.name}")
    with errors_name(path):
        recorded.export_chrome_trace(str(partial))
        os.replace(partial, path)
    return path
