"""metrics.jsonl: one JSON object a line, the record that plots, trackers and reports are made from.

Training rows (`"kind": "train"`), one per step:
    step              updates made, this one included
    tokens            tokens seen since the start of the run, over all ranks, padding of packed sequences included
    loss              mean cross-entropy over the valid tokens of the global batch, nats
    grad_norm         global gradient norm before clipping
    lr                learning rate of the update
    step_time_s       wall time of the step, data included; reporting, validation and saving are not
    data_wait_s       share of it that the slowest rank waited for the next batch
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
Rows of a run with stages have a field `stage`, its name.
"""

from __future__ import annotations

import json
import math
import resource
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

import torch

from megazebra.durable import errors_name, write_atomically

Row = dict[str, Any]


class MetricsFile:
    """Append-only; a row is with the system when `write` returns, so a killed process keeps all it had.

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

    def close(self) -> None:
        with suppress(OSError):  # every row was flushed: what a full disk refused was reported then
            self._file.close()


def read_metrics(path: Path) -> list[Row]:
    """All whole rows; a last line cut short by a kill is left out."""
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


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
