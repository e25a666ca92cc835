"""Everything a run tells the world: console, metrics.jsonl, trackers, plot. Rank 0 speaks, others are silent."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megazebra.checkpoint.manager import Progress
from megazebra.checkpoint.store import Saving
from megazebra.config.stages import Stage
from megazebra.evaluate.results import Row, table
from megazebra.parallel.traffic import TrafficCounter
from megazebra.plan.hardware import peak_flops
from megazebra.train.console import Console
from megazebra.train.engine import StepResult
from megazebra.train.metrics import MetricsFile, loss_of, peak_memory_bytes, read_metrics
from megazebra.train.plot import plot_loss
from megazebra.train.stragglers import StepTimes, Stragglers
from megazebra.train.trackers import open_trackers

_FINAL_MEAN_STEPS = 20  # at most; a tenth of a short run


class Reporter:
    """Reports of rank 0 on one stage of a run.

    device_name: as the maker calls it, for MFU. unigram: cross-entropy of a unigram model on the held-out corpora
    in nats, by their names, where it is known.
    """

    def __init__(
        self, stage: Stage, progress: Progress, device: Any, device_name: str, unigram: dict[str, float]
    ) -> None:
        self.stage = stage
        self.config = config = stage.config
        self.device = device
        self.unigram = unigram
        self.peak = peak_flops(device_name, config.train.precision)
        self.folder = Path(config.run.dir)
        begins = stage.name if progress.step == stage.first_step else None
        self.metrics = MetricsFile(self.folder / "metrics.jsonl", progress.step, begins)
        self.trackers = open_trackers(config, progress.step)
        self.console = Console(config.logging.progress, config.logging.interval, progress.step, stage.total_steps)
        self.started = time.perf_counter()
        self.first = progress
        self._stalls: dict[int, float] = {}
        self._stragglers = Stragglers()

    def message(self, text: str) -> None:
        self.console.message(text)

    def begin_stage(self, step: int, changes: dict[str, Any]) -> None:
        """The stage begins after `step`, with these keys set anew."""
        self._record({"kind": "stage", "step": step, "name": self.stage.name, "number": self.stage.number + 1,
                      "config": changes})  # fmt: skip

    def step(
        self,
        progress: Progress,
        result: StepResult,
        *,
        seconds: float,
        times: StepTimes,
        halo_overlap: float | None,
        device_flops: float,
        traffic: TrafficCounter,
        samples: str,
    ) -> None:
        """Record a step; `metrics.py` says what the fields mean."""
        tokens = self.config.train.global_batch_size * self.config.data.seq_len
        row: dict[str, Any] = {
            "kind": "train",
            "step": progress.step,
            "tokens": progress.tokens,
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "lr": result.lr,
            "step_time_s": seconds,
            "data_wait_s": times.data_wait_s,
            "tokens_per_s": tokens / seconds,
            "flops_per_s": device_flops / seconds,
            "mfu": device_flops / seconds / self.peak if self.peak else None,
            "comm_bytes": traffic.total_bytes,
            "comm": {name: vars(tally) for name, tally in traffic.by_kind().items()},
            "peak_memory_bytes": peak_memory_bytes(self.device),
        }
        if self.config.parallel.context > 1:
            row["context"] = {name: vars(tally) for name, tally in traffic.context().items()}
            row["halo_overlap"] = halo_overlap
        if len(times.work_s) > 1:
            row |= {"work_s": times.median_work_s, "slowest_rank": times.slowest_rank, "step_spread_s": times.spread_s}
        if result.skipped is not None:
            row |= {"skipped": result.skipped, "samples": samples}
        self._record(row)
        self.console.step(row)
        for sentence in self._stragglers.step(times):
            self.message(f"step {progress.step}: {sentence}")

    def validation(self, step: int, source: str, loss: float, seconds: float) -> None:
        row = {"kind": "validation", "step": step, "source": source, "loss": loss, "seconds": seconds}
        self._record(row)
        self.console.validation(row)

    def evaluation(self, step: int, rows: Sequence[Row], seconds: float) -> None:
        for row in rows:
            self._record({"kind": "evaluation", "step": step, **asdict(row)})
        self.message("\n  ".join([f"step {step}: evaluation ({seconds:.1f} s)", *table(rows)]))

    def epochs(self, step: int, epochs: dict[str, float]) -> None:
        self._record({"kind": "data", "step": step, "epochs": epochs})

    def stalled(self, step: int, seconds: float) -> None:
        """Training stood still this long to take the checkpoint of `step`."""
        self._stalls[step] = seconds

    def checkpoint(self, saving: Saving) -> None:
        stall = self._stalls.pop(saving.step)
        self._record(
            {"kind": "checkpoint", "step": saving.step, "bytes": saving.bytes, "stall_s": stall,
             "seconds": saving.seconds}
        )  # fmt: skip
        self.message(
            f"step {saving.step}: checkpoint {saving.folder} ({saving.bytes / 1e6:,.1f} MB in {saving.seconds:.1f} s, "
            f"training stood still for {stall:.1f} s)"
        )

    def finish(self, progress: Progress, skips: int) -> None:
        """Close every record of a stage that has reached its end, draw the plot and print how it went."""
        self.console.close()
        self.metrics.close()
        self.trackers.close()
        plot_loss(self.metrics.path, self.folder / "loss.png", self.unigram)
        print("\n".join(self._summary(progress, skips)), flush=True)

    def stop(self, progress: Progress, stopped_by: signal.Signals) -> None:
        """Close every record of a run that was asked to stop and can go on."""
        where = f": stopped after step {progress.step}, which is saved" if progress.step else " before the first step"
        again = " to go on" if progress.step else ""
        self.message(f"{stopped_by.name} received{where}; start the same command again{again}")
        self.console.close()
        self.metrics.close()
        self.trackers.close()

    def abandon(self) -> None:
        """Close the records of a run that ends in an error, quickly: the error's own message is waiting."""
        with suppress(Exception):
            self.console.close()
            self.metrics.close()
            self.trackers.close(failed=True)

    def _record(self, row: dict[str, Any]) -> None:
        if self.stage.name:
            row["stage"] = self.stage.name
        self.metrics.write(row)
        self.trackers.log(row)

    def _summary(self, progress: Progress, skips: int) -> list[str]:
        rows = [row for row in read_metrics(self.metrics.path) if row.get("stage", "") == self.stage.name]
        losses = [row["loss"] for row in rows if row["kind"] == "train" and row["loss"] is not None]
        validation = {row["source"]: loss_of(row) for row in rows if row["kind"] == "validation"}  # the last of each
        epochs = [row["epochs"] for row in rows if row["kind"] == "data"][-1:]
        minutes, seconds = divmod(round(time.perf_counter() - self.started), 60)
        done = progress.step - self.first.step
        lines = [
            "",
            (f"{self.stage.describe()} is complete: " if self.stage.name else "")
            + f"{progress.step} steps, {progress.tokens:,} tokens ({done} steps now, {minutes} min {seconds} s)"
            + (f", {skips} updates skipped" if skips else ""),
        ]
        if losses:
            last = losses[-max(1, min(_FINAL_MEAN_STEPS, len(losses) // 10)) :]
            mean = sum(last) / len(last)
            chance = f"began at {losses[0]:.4f}, ln(vocabulary) is {math.log(self.config.model.vocab_size):.4f}"
            lines.append(f"  train loss       {mean:.4f}  (mean of the last {len(last)} steps; {chance})")
        for source, loss in validation.items():
            bar = f"  (the bar to beat, a unigram model: {self.unigram[source]:.4f})" if source in self.unigram else ""
            lines.append(f"  validation loss  {loss:.4f}{f'  {source}' if source else ''}{bar}")
        if epochs and len(epochs[0]) > 1:
            gone_through = ", ".join(f"{source} {count:.2f}" for source, count in epochs[0].items())
            lines.append(f"  epochs           {gone_through}")
        lines.append(f"  written to {self.folder}:")
        lines += [f"    {name}" for name in ("metrics.jsonl", "loss.png", "config.yaml")]
        latest = (self.folder / "checkpoints" / "latest").read_text().strip()
        return [*lines, f"    checkpoints/{latest}"]
