"""Which of transformers' model classes can be read or written, and what each of them can represent.

Facts are those of transformers 5.24 (`models/*/configuration_*.py` and `modeling_*.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

# What CwmConfig takes when its config.json has neither rope_parameters nor rope_scaling.
_CWM_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 1_000_000.0,
    "factor": 16.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@dataclass(frozen=True)
class Family:
    """A class of Llama-style decoders.

    windows: the sliding window belongs to no layer, to every layer, or to those that `layer_types` names. A class that
        does not read `layer_types` ignores it silently. `layer_windows`: each layer has its own.
    ropes: how the rotary embeddings of layers may differ: not at all; `no_rope_layers` takes it from some;
        `layer_rope_theta` gives each layer its own base, 0 for none; or global and local layers have one each, or none.
    sinks: every layer has attention sinks; those far below any logit change nothing (NO_SINK).
    qk_norm: queries and keys are always normalized, per head.
    attention_bias, mlp_bias: the class reads the field of that name; else it has no biases there.
    heads_divide_width: it refuses a hidden_size that is no multiple of the number of heads.
    multipliers: it reads Granite's four factors, of which attention's is that on the logits.
    since: the first release of transformers that has it.
    needs_token_ids: without bos_token_id it does not load, without eos_token_id it takes another model's.
    defaults: what its configuration class takes for a field that config.json does not have.
    """

    model_type: str
    architecture: str
    windows: Literal["none", "every layer", "layer_types", "layer_windows"] = "layer_types"
    ropes: Literal["same", "or none", "theta", "by kind"] = "same"
    sinks: bool = False
    qk_norm: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    heads_divide_width: bool = False
    multipliers: bool = False
    since: str = "5.0"
    needs_token_ids: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)


_SHARED_DEFAULTS = {
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "attention_dropout": 0.0,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_parameters": None,
    "sliding_window": None,
    "use_sliding_window": False,
    "layer_types": None,
}

# In the order in which export tries them: the best known first.
FAMILIES = (
    Family(
        "llama",
        "LlamaForCausalLM",
        windows="none",
        attention_bias=True,
        mlp_bias=True,
        heads_divide_width=True,
        defaults=_SHARED_DEFAULTS,
    ),
    Family(
        "mistral",
        "MistralForCausalLM",
        windows="every layer",
        defaults=_SHARED_DEFAULTS | {"num_key_value_heads": 8, "sliding_window": 4096},
    ),
    Family(
        "cwm",
        "CwmForCausalLM",
        mlp_bias=True,
        heads_divide_width=True,
        needs_token_ids=True,
        defaults=_SHARED_DEFAULTS
        | {
            "num_key_value_heads": 8,
            "head_dim": 128,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1_000_000.0,
            "rope_parameters": _CWM_ROPE,
            "sliding_window": 8192,
            "use_sliding_window": True,
        },
    ),
    Family(
        "qwen3",
        "Qwen3ForCausalLM",
        qk_norm=True,
        attention_bias=True,
        defaults=_SHARED_DEFAULTS | {"num_key_value_heads": 32, "head_dim": 128, "sliding_window": 4096},
    ),
    Family(
        "smollm3",
        "SmolLM3ForCausalLM",
        ropes="or none",
        attention_bias=True,
        mlp_bias=True,
        defaults=_SHARED_DEFAULTS | {"num_key_value_heads": 4, "rope_theta": 2_000_000.0, "tie_word_embeddings": True},
    ),
    Family(
        "granite_swa",
        "GraniteSWAForCausalLM",
        ropes="theta",
        sinks=True,
        attention_bias=True,
        mlp_bias=True,
        multipliers=True,
        since="5.15",
        defaults=_SHARED_DEFAULTS
        | {
            "num_key_value_heads": 4,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": True,
            "sliding_window": 128,
            "use_sliding_window": True,
        },
    ),
)
# The class that travels with its weights (remote_code/): it represents every model of ours.
ZEBRA = Family(
    "zebra",
    "ZebraForCausalLM",
    windows="layer_windows",
    ropes="by kind",
    attention_bias=True,
    mlp_bias=True,
    defaults=_SHARED_DEFAULTS | {"rms_norm_eps": 1e-5},
)
BY_MODEL_TYPE = {family.model_type: family for family in (*FAMILIES, ZEBRA)}
