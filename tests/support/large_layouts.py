"""Layouts of 512 ranks: Llama 2's 7B and 70B (Touvron et al. 2023) as Zebra models on long sequences."""

from __future__ import annotations

from typing import Any

from megazebra.config import Config

WORLD = 512
SIZES: dict[str, dict[str, Any]] = {
    "7B": {
        "num_layers": 32, "hidden_size": 4096, "ffn_hidden_size": 11008, "num_attention_heads": 32,
    },
    "70B": {
        "num_layers": 80, "hidden_size": 8192, "ffn_hidden_size": 28672, "num_attention_heads": 64, "num_kv_heads": 8,
    },
}  # fmt: skip
TENSOR = {"7B": 4, "70B": 8}
CONTEXT = 8


def layout(
    size: str, *, layers: int | None = None, recompute: str = "none", seq_len: int = 131072, strategy: str = "auto",
    vocab_size: int = 32000,
) -> Config:  # fmt: skip
    model = SIZES[size] | {"pattern": "GLLL", "window": 512, "vocab_size": vocab_size}
    model["max_position_embeddings"] = seq_len
    return Config.model_validate(
        {
            "model": model | ({} if layers is None else {"num_layers": layers}),
            "parallel": {
                "tensor": TENSOR[size], "context": CONTEXT, "sequence_parallel": True, "context_local": strategy,
                "context_global": strategy,
            },
            "train": {
                "recompute": recompute, "precision": "bf16", "global_batch_size": WORLD // CONTEXT // TENSOR[size],
            },
            "data": {"seq_len": seq_len},
        }
    )  # fmt: skip


def rank_at(config: Config, d: int, c: int, t: int) -> int:
    return (d * CONTEXT + c) * config.parallel.tensor + t
