"""Tiny runs that real DeepSpeed engines save in DeepSpeed's own folders, under several layouts."""

from __future__ import annotations

from typing import Any

from support.checkpoints import Truth, truth
from support.training import CPU, make_engine, run_steps

from megazebra.config.schema import Config
from megazebra.train.engine import start_deepspeed

STEPS = 1
SMALL: dict[str, Any] = {"model__num_layers": 2, "model__pattern": "GL"}
LAYOUTS: dict[int, dict[str, dict[str, Any]]] = {
    4: {
        "tp2-dp2-zero3": {"parallel__tensor": 2, "parallel__zero_stage": 3, "train__precision": "bf16"},
        "tp2-dp2-zero1": {
            "parallel__tensor": 2, "parallel__zero_stage": 1, "train__precision": "bf16",
            "model__tie_word_embeddings": True,
        },
    },
    2: {
        "dp2-zero1": {"parallel__zero_stage": 1},
        "dp2-zero2": {"parallel__zero_stage": 2, "model__attention_bias": True},
        "dp2-zero3": {"parallel__zero_stage": 3},
    },
}  # fmt: skip


def save_with_deepspeed(configs: list[Config]) -> list[Truth]:
    """Train each configuration and let DeepSpeed save it in its run.dir (called on every rank)."""
    start_deepspeed(CPU, timeout_s=60)
    found = []
    for config in configs:
        engine = make_engine(config)
        run_steps(engine, config, range(STEPS))
        engine.deepspeed.save_checkpoint(config.run.dir)
        found.append(truth(engine))
        engine.deepspeed.destroy()
    return found
