"""From a ModelConfig to the transformers class that is the same model, and its config.json."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from megazebra.config.schema import ModelConfig
from megazebra.errors import UserError
from megazebra.hf.families import FAMILIES, ZEBRA, Family
from megazebra.hf.rope import rope_parameters
from megazebra.hf.zebra_class import zebra_fields

_MEND = "--remote-code exports it with a class of its own, which loads with trust_remote_code=True"


def choose_family(config: ModelConfig, remote_code: bool = False) -> Family:
    """The first class that represents the model exactly; where there is none, with `remote_code`, our own.

    Raises UserError naming the options that no class has, or else, for each class, what stands in its way.
    """
    beyond_all = list(_beyond_all(config))
    obstacles = {family.architecture: list(_obstacles(family, config)) for family in FAMILIES}
    if not beyond_all:
        for family in FAMILIES:
            if not obstacles[family.architecture]:
                return family
    if remote_code:
        return ZEBRA
    if beyond_all:
        raise UserError(f"no class of transformers that we write has this model: {'; '.join(beyond_all)}; {_MEND}")
    lines = [f"  {architecture}: {', '.join(listed)}" for architecture, listed in obstacles.items()]
    lines = ["no class of transformers that we write has all options of this model:", *lines, _MEND]
    raise UserError("\n".join(lines))


def config_json(
    family: Family, config: ModelConfig, token_ids: Mapping[str, int | list[int] | None], dtype: str
) -> dict[str, Any]:
    """The config.json of the model as `family`, which represents it.

    token_ids: bos_token_id, eos_token_id, pad_token_id; None where there is none. dtype: of the weights, such as
    'bfloat16'.
    Raises UserError when the class cannot do without an id that is not given.
    """
    missing = [name for name in ("bos_token_id", "eos_token_id") if token_ids[name] is None]
    if family.needs_token_ids and missing:
        options = " and ".join(f"--{name.replace('_', '-')}" for name in missing)
        raise UserError(
            f"{family.architecture} needs {' and '.join(missing)}, and the model folder has no generation_config.json "
            f"that tells; give {options}"
        )
    fields = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "dtype": dtype,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "initializer_range": config.init_std,
        "tie_word_embeddings": config.tie_word_embeddings,
        "attention_dropout": 0.0,
        "use_cache": True,
        **token_ids,
    }
    if family.attention_bias:
        fields["attention_bias"] = config.attention_bias
    if family.mlp_bias:
        fields["mlp_bias"] = config.mlp_bias
    if family.multipliers:
        fields |= dict.fromkeys(("embedding_multiplier", "residual_multiplier", "logits_scaling"), 1.0)
        fields["attention_multiplier"] = config.head_size**-0.5
    if family is ZEBRA:
        return fields | zebra_fields(config)
    return fields | _rope_fields(family, config) | _window_fields(family, config)


def _rope_fields(family: Family, config: ModelConfig) -> dict[str, Any]:
    ropes = [spec.rope for spec in config.attention_specs()]
    enabled = [rope for rope in ropes if rope.enabled]
    # Without any, what is never read.
    shared = rope_parameters((enabled or [config.rope_global])[0], config.head_size)
    fields = {
        "rope_parameters": shared,
        # For readers before transformers 5, which would silently take their class's own theta.
        "rope_theta": shared["rope_theta"],
        "rope_scaling": {name: value for name, value in shared.items() if name != "rope_theta"},
    }
    if family.ropes == "or none":
        fields["no_rope_layers"] = [int(rope.enabled) for rope in ropes]
    if family.ropes == "theta":
        thetas = [rope_parameters(rope, config.head_size)["rope_theta"] if rope.enabled else 0 for rope in ropes]
        fields["layer_rope_theta"] = thetas
    return fields


def _window_fields(family: Family, config: ModelConfig) -> dict[str, Any]:
    if family.windows == "none":
        return {}
    specs = config.attention_specs()
    windows = {spec.window for spec in specs if spec.window is not None}
    fields: dict[str, Any] = {"sliding_window": windows.pop() if windows else None}
    if family.windows == "layer_types":
        fields["use_sliding_window"] = fields["sliding_window"] is not None
        fields["layer_types"] = ["sliding_attention" if spec.is_local else "full_attention" for spec in specs]
    return fields


def _beyond_all(config: ModelConfig) -> Iterator[str]:
    if config.attention_softcap is not None:
        yield f"model.attention_softcap={config.attention_softcap} (only null)"
    if config.final_logit_softcap is not None:
        yield f"model.final_logit_softcap={config.final_logit_softcap} (only null)"
    specs = config.attention_specs()
    windows = sorted({spec.window for spec in specs if spec.window is not None})
    if len(windows) > 1:
        yield f"model.pattern has the windows {windows} (only one)"
    if different := _unlike_first(config, ignored={"rope_theta"}):
        yield f"model.rope_global and model.rope_local differ in more than theta ({' and '.join(map(str, different))})"


def _obstacles(family: Family, config: ModelConfig) -> Iterator[str]:
    specs = config.attention_specs()
    local = [spec for spec in specs if spec.is_local]
    if local and family.windows == "none":
        yield f"model.pattern={config.pattern} has local layers"
    if len(local) < len(specs) and family.windows == "every layer":
        yield f"model.pattern={config.pattern} has global layers"
    if any(spec.sinks for spec in specs) and not family.sinks:
        yield f"model.attention_sinks={config.attention_sinks}"
    if different := _unlike_first(config, ignored={"rope_theta"} if family.ropes == "theta" else set()):
        yield f"model.rope_global and model.rope_local differ ({' and '.join(map(str, different))})"
    if family.ropes == "same" and not all(spec.rope.enabled for spec in specs):
        yield "layers without RoPE (model.rope_global.enabled or model.rope_local.enabled is false)"
    for option, has in (("attention_bias", family.attention_bias), ("mlp_bias", family.mlp_bias)):
        if getattr(config, option) and not has:
            yield f"model.{option}=true"
    if config.qk_norm != family.qk_norm:
        yield f"model.qk_norm={str(config.qk_norm).lower()}"
    if family.heads_divide_width and config.hidden_size % config.num_attention_heads:
        yield f"model.hidden_size={config.hidden_size} is no multiple of the {config.num_attention_heads} heads"


def _unlike_first(config: ModelConfig, ignored: set[str]) -> list[dict[str, Any]]:
    """The first rotary embedding and one that differs from it; empty where all layers that have any share one."""
    ropes = [rope_parameters(spec.rope, config.head_size) for spec in config.attention_specs() if spec.rope.enabled]
    others = [rope for rope in ropes if {**rope, **dict.fromkeys(ignored)} != {**ropes[0], **dict.fromkeys(ignored)}]
    return [ropes[0], others[0]] if others else []
