"""What is known of a run, brought up to date row by row; megazebra/train/metrics.py says what the rows mean."""

from __future__ import annotations

import math
import statistics
from array import array
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megazebra.config import Config, ConfigError, load_config
from megazebra.config.stages import stages_of
from megazebra.monitor.follow import Row

RECENT_STEPS = 50  # over which speeds are medians
# A run that has written nothing for so many of its steps, and for so long, is worth a look: validating, saving and
# compiling write nothing either.
SILENT_STEPS, SILENT_S = 20, 120.0


@dataclass(frozen=True)
class Plan:
    """total_steps: of all stages together; None where the configuration can't be read."""

    total_steps: int | None

    @classmethod
    def read(cls, folder: Path) -> Plan:
        try:
            config: Config = load_config(folder / "config.yaml")
        except ConfigError:  # of another version, or not yet there: everything else can be shown without it
            return cls(None)
        return cls(stages_of(config)[-1].last_step)


class Series:
    """Numbers by step, at 16 bytes each: months of steps fit."""

    def __init__(self) -> None:
        self.steps, self.values = array("q"), array("d")

    def add(self, step: int, value: float) -> None:
        self.steps.append(step)
        self.values.append(value)

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[tuple[int, float]]:
        return zip(self.steps, self.values, strict=True)


class RunState:
    """last: the newest training row. recent: the last of them. losses: of every step that has one.
    validation: losses of every held-out corpus, by its name. evaluations: newest rows by task and length, and in these
    by depth and span of positions.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.last: Row | None = None
        self.recent: deque[Row] = deque(maxlen=RECENT_STEPS)
        self.losses = Series()
        self.validation: dict[str, Series] = {}
        self.checkpoints: deque[Row] = deque(maxlen=3)
        self.checkpoint_count = 0
        self.stage: Row | None = None
        self.epochs: dict[str, float] = {}
        self.skipped = 0
        self.last_skipped: Row | None = None
        self.evaluations: dict[tuple[str, int], dict[str, Row]] = {}

    def absorb(self, row: Row) -> None:
        kind, step = row["kind"], row["step"]
        if kind == "train":
            self.last = row
            self.recent.append(row)
            if (loss := number_in(row, "loss")) is not None:
                self.losses.add(step, loss)
            if "skipped" in row:
                self.skipped += 1
                self.last_skipped = row
        elif kind == "validation":
            series = self.validation.setdefault(str(row.get("source", "")), Series())
            if (loss := number_in(row, "loss")) is not None:
                series.add(step, loss)
        elif kind == "checkpoint":
            self.checkpoints.append(row)
            self.checkpoint_count += 1
        elif kind == "stage":
            self.stage = row
        elif kind == "data" and isinstance(row.get("epochs"), dict):
            self.epochs = row["epochs"]
        elif kind == "evaluation" and isinstance(row.get("length"), int):
            where = str([row.get(name) for name in ("depth", "start", "end")])
            self.evaluations.setdefault((str(row.get("task", "")), row["length"]), {})[where] = row

    @property
    def step(self) -> int:
        return 0 if self.last is None else self.last["step"]

    def recent_values(self, name: str) -> list[float]:
        return [value for row in self.recent if (value := number_in(row, name)) is not None]

    def median(self, name: str) -> float | None:
        """Of the recent steps."""
        values = self.recent_values(name)
        return statistics.median(values) if values else None

    def usual_straggler(self) -> tuple[int, float] | None:
        """The rank that was the slowest most often in recent steps, and in what share of them."""
        counts = Counter(row["slowest_rank"] for row in self.recent if isinstance(row.get("slowest_rank"), int))
        if not counts:
            return None
        rank, times = counts.most_common(1)[0]
        return rank, times / counts.total()

    def seconds_left(self) -> float | None:
        """At the recent speed; validating and saving come on top."""
        seconds = self.median("step_time_s")
        if self.plan.total_steps is None or seconds is None:
            return None
        return max(0, self.plan.total_steps - self.step) * seconds

    def finished(self) -> bool:
        """All steps are made, and the last of them is saved."""
        total = self.plan.total_steps
        return total is not None and any(row["step"] >= total for row in self.checkpoints)

    def silent_for(self, written_at: float | None, now: float) -> float | None:
        """Seconds since the last row, where they are more than one expects; None where they aren't."""
        if written_at is None:
            return None
        silence = now - written_at
        usual = self.median("step_time_s") or 0.0
        return silence if silence > max(SILENT_S, SILENT_STEPS * usual) else None


def number_in(row: Row, name: str) -> float | None:
    """The row's finite number of that name; None where there is none."""
    value: Any = row.get(name)
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) < math.inf:
        return None
    return value
