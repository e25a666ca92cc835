"""From a Hugging Face config.json to a ModelConfig."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megazebra.config.checks import cross_problems
from megazebra.config.schema import MAX_LAYERS, ModelConfig
from megazebra.errors import UserError
from megazebra.hf.families import BY_MODEL_TYPE, ZEBRA, Family
from megazebra.hf.layer_ropes import layers_with_rope, rope_of_kinds
from megazebra.pattern import pattern_symbols

# Fields under other names; their classes have no default for them that a model would rely on.
_SIZES = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_position_embeddings",
}
_ONLY_ZEBRA = {
    "qk_norm": "qk_norm",
    "attention_sinks": "attention_sinks",
    "attention_softcap": "attn_logit_softcapping",
    "final_logit_softcap": "final_logit_softcapping",
}
_KINDS = {"G": "full_attention", "L": "sliding_attention"}


def read_fields(folder: Path) -> dict[str, Any]:
    """The fields of a model folder's config.json. Raises UserError when it is missing or no JSON object."""
    path = folder / "config.json"
    try:
        fields = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; give the folder of a Hugging Face model") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if not isinstance(fields, dict):
        raise UserError(f"{path} is no JSON object; give the folder of a Hugging Face model")
    return fields


def family_of(fields: Mapping[str, Any]) -> Family:
    """Raises UserError for a model_type that we cannot read."""
    kind = fields.get("model_type")
    family = BY_MODEL_TYPE.get(kind) if isinstance(kind, str) else None
    if family is None:
        raise UserError(f"model_type={kind!r} is not supported; we read {', '.join(BY_MODEL_TYPE)}")
    return family


def model_config(
    fields: Mapping[str, Any], pattern: str | None = None, window: int | None = None, sinks: Collection[int] = ()
) -> ModelConfig:
    """The model that a config.json describes; `pattern` and `window` replace its own.

    sinks: the layers whose weights have attention sinks, of a class whose configuration does not tell.
    Raises UserError, naming field, value and mend, for what we cannot represent.
    """
    family = family_of(fields)
    defaults = family.defaults

    def value(name: str) -> Any:
        return fields.get(name, defaults[name])

    _refuse_unsupported(family, fields)
    own_pattern, own_window = _layers(family, fields)
    settings = {
        **{ours: _size(fields, theirs) for ours, theirs in _SIZES.items()},
        "num_kv_heads": value("num_key_value_heads"),
        "head_dim": value("head_dim"),
        "pattern": own_pattern if pattern is None else pattern,
        "qk_norm": family.qk_norm,
        "attention_bias": family.attention_bias and value("attention_bias"),
        "mlp_bias": family.mlp_bias and value("mlp_bias"),
        "tie_word_embeddings": value("tie_word_embeddings"),
        "rms_norm_eps": value("rms_norm_eps"),
        "init_std": value("initializer_range"),
    }
    if family is ZEBRA:
        settings |= {ours: fields[theirs] for ours, theirs in _ONLY_ZEBRA.items() if theirs in fields}
    window_there = own_window if window is None else window
    if window_there is not None:
        settings["window"] = window_there
    model = _checked(settings)
    symbols = pattern_symbols(model.pattern, model.num_layers)
    if "L" in symbols and window_there is None:
        raise UserError(f"pattern {model.pattern!r} has local layers and the model has no window; give --window")
    if "L" not in symbols and window is not None:
        raise UserError(f"window {window} is not read: pattern {model.pattern!r} has no local layer; give --pattern")
    settings |= rope_of_kinds(family, fields, symbols)
    if family.sinks:
        settings["attention_sinks"] = _attention_sinks(symbols, sinks)
    return _checked(settings)


def _size(fields: Mapping[str, Any], name: str) -> int:
    value = fields.get(name)
    if not isinstance(value, int) or value < 1:
        raise UserError(f"{name}={value!r} in config.json must be a whole number >= 1; add or correct it")
    return value


def _refuse_unsupported(family: Family, fields: Mapping[str, Any]) -> None:
    value = {name: fields.get(name, family.defaults.get(name)) for name in ("hidden_act", "attention_dropout")}
    if value["hidden_act"] != "silu":
        raise UserError(f"hidden_act={value['hidden_act']!r} is not supported; our feed-forward layers have silu")
    if value["attention_dropout"]:
        raise UserError(
            f"attention_dropout={value['attention_dropout']} is not supported; set it to 0 to train without dropout"
        )
    if fields.get("quantization_config"):
        raise UserError("quantization_config: quantized weights are not supported; take the unquantized model")
    if family.multipliers:
        _refuse_multipliers(fields)
    if family.windows in ("none", "every layer") and set(fields.get("layer_types") or []) - {"full_attention"}:
        raise UserError(
            f"layer_types is ignored by {family.architecture}, so what the model computes is not what config.json "
            "says; remove layer_types, or correct model_type (cwm reads them)"
        )


def _refuse_multipliers(fields: Mapping[str, Any]) -> None:
    head_dim = fields.get("head_dim") or _size(fields, "hidden_size") // _size(fields, "num_attention_heads")
    wanted = dict.fromkeys(("embedding_multiplier", "residual_multiplier", "logits_scaling"), 1.0)
    for name, only in (wanted | {"attention_multiplier": head_dim**-0.5}).items():
        value = fields.get(name, 1.0)
        if not math.isclose(value, only, rel_tol=1e-6):
            raise UserError(f"{name}={value!r} is not supported; our models have {only:g} there")


def _layers(family: Family, fields: Mapping[str, Any]) -> tuple[str | tuple[str | int, ...], int | None]:
    """The model's own pattern and window."""
    layers = _size(fields, "num_hidden_layers")
    if layers > MAX_LAYERS:
        raise UserError(f"num_hidden_layers={layers} in config.json is more than {MAX_LAYERS}; correct it")
    if family.windows == "none":
        return "G", None
    if family.windows == "layer_windows":
        return _layer_windows(fields, layers)
    window = fields.get("sliding_window", family.defaults["sliding_window"])
    if family.windows == "every layer":
        return ("L", window) if window else ("G", None)
    if not fields.get("use_sliding_window", family.defaults["use_sliding_window"]):
        window = None
    kinds = fields.get("layer_types") or _default_layer_types(family, fields, layers, window)
    symbol_of = {kind: symbol for symbol, kind in _KINDS.items()}
    if not isinstance(kinds, list) or len(kinds) != layers or not all(kind in list(symbol_of) for kind in kinds):
        raise UserError(
            f"layer_types={kinds} must name {layers} layers (num_hidden_layers), each {' or '.join(symbol_of)}"
        )
    symbols = "".join(symbol_of[kind] for kind in kinds)
    if "L" in symbols and not window:
        raise UserError(
            "layer_types has sliding_attention but there is no window; set sliding_window (and use_sliding_window)"
        )
    return _shortest(symbols), window


def _default_layer_types(family: Family, fields: Mapping[str, Any], layers: int, window: int | None) -> list[str]:
    """What the class makes of a config.json without `layer_types`."""
    match family.model_type:
        case "cwm" | "granite_swa":
            is_local = [i % 4 != 0 for i in range(layers)]
        case "qwen3":
            first = fields.get("max_window_layers", 28)
            if not isinstance(first, int):
                raise UserError(f"max_window_layers={first!r} must be a whole number; correct it")
            is_local = [i >= first for i in range(layers)]
        case _:
            is_local = [not has_rope for has_rope in layers_with_rope(fields, layers)]
    return [_KINDS["L" if local and window else "G"] for local in is_local]


def _layer_windows(fields: Mapping[str, Any], layers: int) -> tuple[str | tuple[str | int, ...], int | None]:
    windows = fields.get("layer_windows") or [None] * layers
    if not isinstance(windows, list) or len(windows) != layers or not all(w is None or type(w) is int for w in windows):
        raise UserError(
            f"layer_windows={windows} must have an entry for each of num_hidden_layers={layers}, a number or null"
        )
    usual = next((window for window in windows if window is not None), None)
    symbols = tuple("G" if window is None else "L" if window == usual else window for window in windows)
    return (symbols if set(symbols) - {"G", "L"} else _shortest("".join(map(str, symbols)))), usual


def _attention_sinks(symbols: Sequence[str | int], layers: Collection[int]) -> str:
    """model.attention_sinks of a model in which these layers have them."""
    of_kind = {
        "none": set(),
        "all": set(range(len(symbols))),
        "local": {layer for layer, symbol in enumerate(symbols) if symbol != "G"},
    }
    for kind, those in of_kind.items():
        if set(layers) == those:
            return kind
    raise UserError(
        f"layers {sorted(layers)} have attention sinks, which are neither none, all, nor the local ones of the pattern "
        f"{''.join(map(str, symbols))}; choose a pattern with those local layers"
    )


def _checked(settings: dict[str, Any]) -> ModelConfig:
    try:
        model = ModelConfig.model_validate(settings)
    except ValidationError as error:
        first = error.errors()[0]
        name = _SIZES.get(str(first["loc"][0]), first["loc"][0])
        raise UserError(f"{name}={first['input']!r}: {first['msg']}") from error
    problems = [f"{key} {message}" for key, message in cross_problems({"model": model})]
    if problems:
        raise UserError("; ".join(problems))
    return model


def _shortest(symbols: str) -> str:
    """The shortest string that tiles to these layers."""
    lengths = range(1, len(symbols) + 1)
    return next(symbols[:n] for n in lengths if (symbols[:n] * len(symbols))[: len(symbols)] == symbols)
