"""What a person at the terminal sees of a run."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm

Row = dict[str, Any]


class Console:
    """A bar on a terminal, one line a step otherwise; messages in between keep the bar whole."""

    def __init__(self, progress: str, interval: int, first_step: int, total_steps: int) -> None:
        bar = progress == "bar" or (progress == "auto" and sys.stdout.isatty())
        self.interval = interval
        self.total_steps = total_steps
        self.bar = tqdm(total=total_steps, initial=first_step, unit="step", file=sys.stdout) if bar else None

    def message(self, text: str) -> None:
        if self.bar is not None:
            tqdm.write(text, file=sys.stdout)
        else:
            print(text, flush=True)

    def step(self, row: Row) -> None:
        if row.get("skipped"):
            self.message(f"step {row['step']}: update skipped, {row['skipped']} ({row['samples']})")
        if self.bar is not None:
            self.bar.set_postfix_str(f"loss {row['loss']:.3f}, {row['tokens_per_s']:,.0f} tok/s", refresh=False)
            self.bar.update(1)
        elif row["step"] % self.interval == 0 or row["step"] in (1, self.total_steps):
            print(self._line(row), flush=True)

    def validation(self, row: Row) -> None:
        source = f" {row['source']}" if row["source"] else ""
        self.message(f"step {row['step']}: validation loss{source} {row['loss']:.4f} ({row['seconds']:.1f} s)")

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()

    def _line(self, row: Row) -> str:
        mfu = "" if row["mfu"] is None else f"  MFU {row['mfu']:.1%}"
        width = len(str(self.total_steps))
        return (
            f"step {row['step']:>{width}}/{self.total_steps}  loss {row['loss']:.4f}  grad norm {row['grad_norm']:.3f}"
            f"  lr {row['lr']:.2e}  {row['tokens_per_s']:>8,.0f} tok/s  {row['flops_per_s'] / 1e9:,.1f} GFLOP/s{mfu}"
            f"  {row['step_time_s']:.2f} s"
        )
