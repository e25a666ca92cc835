"""Learning rate as a function of the step."""

from __future__ import annotations

import math

from megazebra.config.schema import OptimizerConfig, ScheduleConfig


def learning_rate(step: int, total_steps: int, optimizer: OptimizerConfig, schedule: ScheduleConfig) -> float:
    """Rate of the update number `step`, counted from 0, of `total_steps`.

    Warmup is linear and reaches optimizer.lr with its last step. cosine: Loshchilov and Hutter 2017;
    wsd (warmup, stable, decay): Hu et al. 2024, with a linear last stage.
    """
    if step < schedule.warmup_steps:
        return optimizer.lr * (step + 1) / schedule.warmup_steps
    if schedule.kind == "constant":
        return optimizer.lr
    start = schedule.warmup_steps
    if schedule.kind == "wsd":
        start = max(start, total_steps - (schedule.decay_steps or max(1, total_steps // 10)))
    # Warmup's last update gets the full rate, decay's last the minimum.
    progress = min(1.0, max(0.0, (step + 1 - start) / max(1, total_steps - start)))
    remaining = 0.5 * (1 + math.cos(math.pi * progress)) if schedule.kind == "cosine" else 1 - progress
    return optimizer.lr * (schedule.min_lr_ratio + (1 - schedule.min_lr_ratio) * remaining)
