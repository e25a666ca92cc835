"""From the options that Megatron saved with a model to our configuration, as far as we have what they ask for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from megazebra.checkpoint.store import CheckpointError
from megazebra.foreign.torch_files import Inert

# Options whose value decides what the model computes: what we have, and how Megatron's option is called. An older
# Megatron does not know all of them; one that is not there has no other value. Megatron-DeepSpeed spells some otherwise
# (deepspeedai/Megatron-DeepSpeed, megatron/arguments.py): rmsnorm, num_experts [1], rope_theta, num_key_value_heads.
_ONLY: dict[str, tuple[Callable[[Any], bool], str]] = {
    "swiglu": (lambda value: value is True, "only SwiGLU feed-forward layers (--swiglu)"),
    "normalization": (lambda value: str(value).lower() == "rmsnorm", "only RMSNorm (--normalization RMSNorm)"),
    "position_embedding_type": (
        lambda value: value == "rope",
        "only rotary embeddings (--position-embedding-type rope)",
    ),
    "rotary_percent": (lambda value: value == 1.0, "only whole heads rotate (--rotary-percent 1.0)"),
    "rotary_interleaved": (
        lambda value: not value,
        "the first half of a head rotates with the second, not neighbours (no --rotary-interleaved)",
    ),
    "rotary_scaling_factor": (lambda value: value in (None, 1.0), "no YaRN"),
    "apply_layernorm_1p": (lambda value: not value, "norms multiply by their weight (no --apply-layernorm-1p)"),
    "apply_residual_connection_post_layernorm": (lambda value: not value, "residuals pass the norms by"),
    "add_qkv_bias": (lambda value: not value, "biases on all projections of attention or on none"),
    "num_experts": (lambda value: not value or value == [1], "no experts"),
    "multi_latent_attention": (lambda value: not value, "no latent attention"),
    "qk_l2_norm": (lambda value: not value, "RMSNorm with weights on queries and keys (--qk-layernorm)"),
    "attention_output_gate": (lambda value: not value, "no gate on attention's output"),
    "no_rope_freq": (lambda value: not value, "the same rotary embedding in all layers"),
    "window_size": (lambda value: not value, "no windows of Megatron's; give --model.pattern and --model.window"),
    "pipeline_model_parallel_size": (lambda value: value == 1, "no pipelines; save with pipeline-parallel size 1"),
}
_REQUIRED = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "max_position_embeddings")


def saved_options(tree: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The options in a file of Megatron's; none where another trainer wrote it.

    Raises CheckpointError for files older than Megatron-LM of 2021, which order queries, keys and values differently.
    """
    namespace = tree.get("args")
    if not isinstance(namespace, Inert) or not isinstance(namespace.state, dict):
        return {}
    version = tree.get("checkpoint_version", 0)
    if version < 2:
        raise CheckpointError(
            f"{where} has checkpoint_version {version}; versions below 2 order queries, keys and values differently: "
            "load and save it with a newer Megatron first"
        )
    return namespace.state


def refuse_unsupported(options: Mapping[str, Any], where: str) -> None:
    """Raises CheckpointError, naming option and value, where the model computes what ours can't, whatever its shape."""
    problems = [
        f"{name}={options[name]!r}: {ours}"
        for name, (fits, ours) in _ONLY.items()
        if name in options and not fits(options[name])
    ]
    if problems:
        raise CheckpointError(f"{where} was trained with options that we cannot represent: {'; '.join(problems)}")


def model_settings(options: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What the options say of the configuration's model section.

    Raises CheckpointError for what is not there.
    """
    if missing := [f"{name} is missing" for name in _REQUIRED if not options.get(name)]:
        raise CheckpointError(f"the options saved in {where} do not say what the model is: {'; '.join(missing)}")
    settings = {name: options[name] for name in _REQUIRED} | {
        "num_kv_heads": _kv_heads(options),
        "head_dim": options.get("kv_channels"),
        "pattern": "G",
        "tie_word_embeddings": not options.get("untie_embeddings_and_output_weights", False),
        "attention_bias": bool(options.get("add_bias_linear", True)),
        "mlp_bias": bool(options.get("add_bias_linear", True)),
        "qk_norm": bool(options.get("qk_layernorm", False)),
        "rms_norm_eps": options.get("norm_epsilon", options.get("layernorm_epsilon", 1e-5)),
        "rope_global": _rope(options),
    }
    # Without it the vocabulary is only known with its padding.
    if options.get("vocab_size"):
        settings["vocab_size"] = options["vocab_size"]
    return settings


def _kv_heads(options: Mapping[str, Any]) -> int | None:
    if "num_key_value_heads" in options:
        return options["num_key_value_heads"]
    return options.get("num_query_groups") if options.get("group_query_attention") else None


def _rope(options: Mapping[str, Any]) -> dict[str, Any]:
    rope: dict[str, Any] = {"theta": float(options.get("rotary_base", options.get("rope_theta", 10000)))}
    interpolation = options.get("rotary_seq_len_interpolation_factor")
    if options.get("use_rope_scaling"):  # Llama 3's; all but the factor are constants in Megatron
        rope |= {
            "scaling": "llama3",
            "factor": float(options.get("rope_scaling_factor", 8.0)),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
    elif interpolation:
        rope |= {"scaling": "linear", "factor": float(interpolation)}
    return rope
