"""metrics.jsonl: one JSON object a line, the record that plots, trackers and reports are made from.

Training rows (`"kind": "train"`), one per step:
    step              updates made, this one included
    tokens            tokens seen since the start of the run, over all ranks, padding of packed sequences included
    loss              mean cross-entropy over the valid tokens of the global batch, nats
    grad_norm         global gradient norm before clipping
    lr                learning rate of the update
    step_time_s       wall time of the step, data included; reporting, validation and saving are not
    data_wait_s       share of it that the slowest rank waited for the next batch
    work_s            own work of the median rank in the step: without its time in collectives and waiting for halos
                      (megazebra/train/stragglers.py says what counts); this and the next two absent with one rank
    slowest_rank      the rank with most work of its own
    step_spread_s     its own work above the median: about what a typical rank waits for it
    tokens_per_s      tokens of the global batch / step_time_s
    flops_per_s       model operations of one device / step_time_s (megazebra/plan/flops.py says what counts)
    mfu               flops_per_s / peak of the device; null where the peak is not known
    comm_bytes        bytes rank 0 received in this step's collectives, ZeRO's included
    comm              the same by group and kind: {"tp.all_reduce": {"calls": .., "bytes": ..}}
    context           what of that is context parallelism's, by kind of layer and strategy: {"local.halo": {..}};
                      absent without it
    halo_overlap      share of the time that halos were under way in which the ranks computed; null where that isn't
                      measured (GPUs: the host doesn't wait there) or nothing was sent; absent as above
    peak_memory_bytes most device memory rank 0 has allocated; on CPU its largest resident size
    skipped           why the update was not made; absent otherwise
Stage rows (`"kind": "stage"`), where one begins: step (updates made before it), name, number (from 1), and what is new
in it: `config`, by dotted key.
Data rows (`"kind": "data"`), one per checkpoint: step, epochs (how often each source has been gone through, by name).
Checkpoint rows (`"kind": "checkpoint"`), one per checkpoint that is complete: step, bytes (of all ranks), stall_s (how
long training stood still for it), seconds (until it was complete).
Validation rows (`"kind": "validation"`), one per held-out corpus: step, source ('' for data.validation_path), loss,
seconds. When a stage begins, they say how the weights of the stage before do under its length and pattern.
Evaluation rows (`"kind": "evaluation"`), one per task, length and depth or span of positions: step, and what
megazebra/evaluate/results.py says.
Rows of a run with stages have a field `stage`, its name.
"""

from __future__ import annotations

import errno
import json
import math
import os
import resource
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

import torch

from megazebra.durable import errors_name, write_atomically

Row = dict[str, Any]
_IDENTITY = ("source", "task", "length", "depth", "start", "end")


class MetricsFile:
    """Append-only; a row is with the system when `write` returns, so a killed process keeps all it had. `write` raises
    OSError, which names the file, when the disk is full or the file was deleted.

    resumed_step: rows after it belong to a run that went further than its last checkpoint and are dropped.
    beginning_stage: the stage that begins there; rows that it has written already are dropped.
    """

    def __init__(self, path: Path, resumed_step: int = 0, beginning_stage: str | None = None) -> None:
        self.path = path
        rows = [row for row in read_metrics(path) if row["step"] <= resumed_step] if path.exists() else []
        if beginning_stage:
            rows = [row for row in rows if row.get("stage") != beginning_stage]
        write_atomically(path, "".join(_line(row) for row in rows).encode())
        self._file: TextIO = path.open("a")

    def write(self, row: Row) -> None:
        with errors_name(self.path):
            self._file.write(_line(row))
            self._file.flush()
            if not os.fstat(self._file.fileno()).st_nlink:  # the system would go on writing, to nowhere
                raise FileNotFoundError(errno.ENOENT, "was deleted while the run goes on")

    def close(self) -> None:
        with suppress(OSError):  # every row was flushed: what a full disk refused was reported then
            self._file.close()


def read_metrics(path: Path) -> list[Row]:
    """The rows up to the first that is not whole: a last line cut short by a kill is left out."""
    rows: list[Row] = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not isinstance(row, dict) or not isinstance(row.get("kind"), str) or not isinstance(row.get("step"), int):
            break
        rows.append(row)
    return rows


def identity_of(row: Row) -> dict[str, Any]:
    """What tells a row from the others of its kind and step."""
    return {name: row[name] for name in _IDENTITY if row.get(name) not in (None, "")}


def loss_of(row: Row) -> float:
    """A row's loss: NaN and inf are null in the file."""
    return math.nan if row["loss"] is None else row["loss"]


def peak_memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _line(row: Row) -> str:
    # NaN and inf are no JSON: a skipped step's loss becomes null, and `skipped` says what it was.
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    return json.dumps(finite) + "\n"
