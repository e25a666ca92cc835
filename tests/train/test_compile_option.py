"""train.compile under ZeRO's hooks: the same training up to rounding."""

from __future__ import annotations

import torch
from support.distributed import run_distributed
from support.training import tiny_config, train_under_deepspeed


def test_trains_as_without() -> None:
    cases = [(0, "none"), (2, "selective"), (3, "full")]
    configs = [
        tiny_config(
            parallel__zero_stage=stage,
            train__steps=2,
            train__compile=compiled,
            train__recompute=recompute,
            optimizer__name="sgd",
        )
        for stage, recompute in cases
        for compiled in (False, True)
    ]
    runs = run_distributed(train_under_deepspeed, 2, configs)[0]
    for case, plain, compiled in zip(cases, runs[::2], runs[1::2], strict=True):
        # Two steps in float32: losses of 4 and weights of one with some hundred roundings of 6e-8.
        torch.testing.assert_close(compiled.losses, plain.losses, rtol=1e-5, atol=0, msg=str(case))
        torch.testing.assert_close(compiled.weights, plain.weights, rtol=0, atol=1e-5, msg=str(case))
