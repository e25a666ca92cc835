"""Megatron's checkpoint folders, written from what its documentation and sources say of the layout, not by our reader.

Legend: T tensor-parallel ranks, G groups (key/value heads), N query heads a group, D elements a head, E width of the
residual stream, F of the feed-forward layer, V rows of the padded vocabulary.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig

CORE = {
    "embedding": "embedding.word_embeddings.weight",
    "layer": "decoder.layers.{}.",
    "norm1": "self_attention.linear_qkv.layer_norm_weight",
    "qkv": "self_attention.linear_qkv.weight",
    "proj": "self_attention.linear_proj.weight",
    "norm2": "mlp.linear_fc1.layer_norm_weight",
    "fc1": "mlp.linear_fc1.weight",
    "fc2": "mlp.linear_fc2.weight",
    "norm": "decoder.final_layernorm.weight",
    "output": "output_layer.weight",
}
CORE_LOCAL = CORE | {"norm1": "input_layernorm.weight", "norm2": "pre_mlp_layernorm.weight"}
LEGACY = {
    "embedding": "language_model.embedding.word_embeddings.weight",
    "layer": "language_model.encoder.layers.{}.",
    "norm1": "input_norm.weight",
    "qkv": "self_attention.query_key_value.weight",
    "proj": "self_attention.dense.weight",
    "norm2": "post_attention_norm.weight",
    "fc1": "mlp.dense_h_to_4h.weight",
    "fc2": "mlp.dense_4h_to_h.weight",
    "norm": "language_model.encoder.final_norm.weight",
    "output": "language_model.output_layer.weight",
}
PADDED_VOCABULARY = 128


def rank_weights(
    weights: dict[str, Tensor], config: LlamaConfig, names: dict[str, str], ranks: int
) -> list[dict[str, Tensor]]:
    """What every tensor-parallel rank holds of a Llama's state dict, in Megatron's order of modules."""
    G, N = config.num_key_value_heads, config.num_attention_heads // config.num_key_value_heads
    D, E = config.head_dim, config.hidden_size
    found: list[dict[str, Tensor]] = [{} for _ in range(ranks)]

    def give(name: str, parts: Any) -> None:
        for shards, part in zip(found, parts, strict=True):
            shards[name] = part.contiguous()

    def vocabulary(weight_VE: Tensor) -> Any:
        # Rows that must not be taken for tokens.
        padding = torch.full((PADDED_VOCABULARY - len(weight_VE), E), 1e6, dtype=weight_VE.dtype)
        return torch.cat([weight_VE, padding]).chunk(ranks)

    give(names["embedding"], vocabulary(weights["model.embed_tokens.weight"]))
    for layer in range(config.num_hidden_layers):
        here, there = f"model.layers.{layer}.", names["layer"].format(layer)
        q_GNDE = weights[f"{here}self_attn.q_proj.weight"].view(G, N, D, E)
        k_G1DE = weights[f"{here}self_attn.k_proj.weight"].view(G, 1, D, E)
        v_G1DE = weights[f"{here}self_attn.v_proj.weight"].view(G, 1, D, E)
        qkv = torch.cat([q_GNDE, k_G1DE, v_G1DE], dim=1)
        gate_TFE = weights[f"{here}mlp.gate_proj.weight"].view(ranks, -1, E)
        up_TFE = weights[f"{here}mlp.up_proj.weight"].view(ranks, -1, E)
        give(there + names["norm1"], [weights[f"{here}input_layernorm.weight"]] * ranks)
        give(there + names["qkv"], [part.reshape(-1, E) for part in qkv.chunk(ranks)])
        give(there + names["proj"], weights[f"{here}self_attn.o_proj.weight"].chunk(ranks, dim=1))
        give(there + names["norm2"], [weights[f"{here}post_attention_layernorm.weight"]] * ranks)
        give(there + names["fc1"], torch.cat([gate_TFE, up_TFE], dim=1))
        give(there + names["fc2"], weights[f"{here}mlp.down_proj.weight"].chunk(ranks, dim=1))
    give(names["norm"], [weights["model.norm.weight"]] * ranks)
    if not config.tie_word_embeddings:
        give(names["output"], vocabulary(weights["lm_head.weight"]))
    return found


def options(config: LlamaConfig, **changes: Any) -> argparse.Namespace:
    """The options that Megatron would have been started with; `...` removes one."""
    found = {
        "num_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.intermediate_size,
        "num_attention_heads": config.num_attention_heads,
        "group_query_attention": True,
        "num_query_groups": config.num_key_value_heads,
        "kv_channels": config.head_dim,
        "max_position_embeddings": config.max_position_embeddings,
        "position_embedding_type": "rope",
        "rotary_base": 10000,
        "rotary_percent": 1.0,
        "rotary_interleaved": False,
        "swiglu": True,
        "normalization": "RMSNorm",
        "norm_epsilon": config.rms_norm_eps,
        "add_bias_linear": False,
        "add_qkv_bias": False,
        "untie_embeddings_and_output_weights": not config.tie_word_embeddings,
        "vocab_size": config.vocab_size,
        "padded_vocab_size": PADDED_VOCABULARY,
        "pipeline_model_parallel_size": 1,
        "num_experts": None,
        "params_dtype": torch.float32,
        "consumed_train_samples": 24,
        **changes,
    }
    return argparse.Namespace(**{name: value for name, value in found.items() if value is not ...})


def write_megatron(path: Path, ranks: list[dict[str, Tensor]], args: argparse.Namespace, **changes: Any) -> Path:
    """The folder that Megatron writes after 12 iterations; returns iter_0000012."""
    folder = path / "iter_0000012"
    for rank, shards in enumerate(ranks):
        (folder / f"mp_rank_{rank:02d}").mkdir(parents=True)
        content = {
            "args": args,
            "checkpoint_version": 3.0,
            "iteration": 12,
            "model": _nested(shards) if any("language_model" in name for name in shards) else _with_extra(shards),
            "rng_state": [{"random_rng_state": random.getstate(), "np_rng_state": np.random.get_state()}],
            **changes,
        }
        torch.save(content, folder / f"mp_rank_{rank:02d}" / "model_optim_rng.pt")
    (path / "latest_checkpointed_iteration.txt").write_text("12")
    return folder


def _nested(shards: dict[str, Tensor]) -> dict[str, Any]:
    """The older generation nests: embedding, encoder and output layer in a language_model, layers flat."""
    tree: dict[str, Any] = {}
    for name, shard in shards.items():
        model, module, rest = name.split(".", 2)
        place = tree.setdefault(model, {}).setdefault(module, {})
        if module == "embedding":
            place, rest = place.setdefault("word_embeddings", {}), "weight"
        place[rest] = shard
    return tree


def _with_extra(shards: dict[str, Tensor]) -> dict[str, Any]:
    """The newer one is flat; Transformer Engine adds what its kernels want to remember."""
    return shards | {"decoder.layers.0.self_attention.linear_qkv._extra_state": torch.zeros(3, dtype=torch.uint8)}


def write_zero_1(path: Path, ranks: list[dict[str, Tensor]], args: argparse.Namespace, data: int) -> Path:
    """The folder that Megatron-DeepSpeed writes under ZeRO 1: one flat buffer, shared by `data` ranks."""
    folder = path / "global_step12"
    folder.mkdir(parents=True)
    for mp_rank, shards in enumerate(ranks):
        flat = torch.cat([shard.reshape(-1) for shard in shards.values()])
        model = {
            "param_shapes": [{name: shard.shape for name, shard in shards.items()}],
            "args": args,
            "checkpoint_version": 3.0,
            "ds_version": "0.16.0",
            "global_steps": 12,
            "global_samples": 24,
        }
        torch.save(model, folder / f"mp_rank_{mp_rank:02d}_model_states.pt")
        part = -(-flat.numel() // (2 * data)) * 2
        for dp_rank, buffer in enumerate(flat.split(part)):
            state = {
                "single_partition_of_fp32_groups": [buffer.clone()],
                "base_optimizer_state": {"state": {}, "param_groups": []},
                "partition_count": data,
            }
            path_of_rank = folder / f"zero_pp_rank_{dp_rank}_mp_rank_{mp_rank:02d}_optim_states.pt"
            torch.save({"optimizer_state_dict": state}, path_of_rank)
    return folder
