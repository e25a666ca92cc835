"""Rotary embeddings as config.json tells them, both ways."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from megazebra.config.schema import RopeConfig
from megazebra.errors import UserError

_LENGTH = "original_max_position_embeddings"
# What each rope_type of ours reads beside rope_theta, under the same names on both sides.
_OPTIONS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", _LENGTH, "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor", _LENGTH, "beta_fast", "beta_slow", "attention_factor"),
    "longrope": ("factor", _LENGTH, "short_factor", "long_factor", "attention_factor"),
}


def read_rope(fields: Mapping[str, Any], defaults: Mapping[str, Any]) -> RopeConfig:
    """The rotary embedding of a config.json in either spelling: `rope_parameters`, or `rope_theta` and `rope_scaling`.

    defaults: the class's own `rope_theta`, and `rope_parameters` where it has any.
    Raises UserError when the spellings differ or we don't have the kind.
    """
    options = _spelled(fields, defaults)
    kind = options.pop("rope_type")
    if not isinstance(kind, str) or kind not in _OPTIONS:
        raise UserError(
            f"rope_type={kind!r} is not supported (we have {', '.join(_OPTIONS)}); "
            "remove it to train without scaling, or choose another kind"
        )
    theta = options.pop("rope_theta")
    if kind in ("llama3", "yarn", "longrope"):
        longest = fields.get("max_position_embeddings")
        options[_LENGTH] = length = fields.get(_LENGTH) or options.get(_LENGTH) or longest
        for name, value in (("max_position_embeddings", longest), (_LENGTH, length)):
            if value is not None and not (isinstance(value, int | float) and 1 <= value < math.inf):
                raise UserError(f"{name}={value!r} must be a number of tokens; correct it")
        if "factor" not in options and kind != "llama3" and longest:
            options["factor"] = longest / length
    for name, value in options.items():
        if name not in _OPTIONS[kind]:
            known = ", ".join(("rope_theta", *_OPTIONS[kind]))
            raise UserError(
                f"{name}={value!r} of rope_type={kind!r} is not supported (we read {known}); "
                "remove it if the model does not depend on it"
            )
    scaling = "none" if kind == "default" else kind
    try:
        return RopeConfig.model_validate({"theta": theta, "scaling": scaling, **options})
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"rope_parameters: {first['loc'][0]}={first['input']!r}: {first['msg']}") from error


def rope_parameters(rope: RopeConfig, head_dim: int) -> dict[str, Any]:
    """The `rope_parameters` that give the same angles; equal for RopeConfigs that mean the same."""
    theta = rope.theta
    if rope.scaling == "ntk":  # a new base; transformers has it only as one that moves with the length ("dynamic")
        theta *= rope.factor ** (head_dim / (head_dim - 2))
    elif rope.scaling == "abf":
        assert rope.abf_theta is not None
        theta = rope.abf_theta
    kind = rope.scaling if rope.scaling in _OPTIONS else "default"
    values = rope.model_dump(mode="json", include=set(_OPTIONS[kind]), exclude_none=True)
    return {"rope_type": kind, "rope_theta": theta, **values}


def _spelled(fields: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """rope_type, rope_theta and the other options, from wherever they stand; transformers lets some of them lose."""
    found: dict[str, tuple[str, Any]] = {}
    spellings = [(name, fields[name]) for name in ("rope_parameters", "rope_scaling") if fields.get(name)]
    places = [*spellings, ("config.json", {"rope_theta": fields.get("rope_theta")})]
    places += [("config.json", {"partial_rotary_factor": fields.get("partial_rotary_factor")})]
    for place, options in places:
        if not isinstance(options, Mapping):
            raise UserError(f'{place}={options!r} must be an object, such as {{"rope_type": "default"}}')
        for name, value in options.items():
            name = "rope_type" if name == "type" else name
            if isinstance(value, Mapping):
                raise UserError(
                    f"{place}.{name}: a rotary embedding for each kind of layer is not read by this class; "
                    "give all layers one"
                )
            if value is None or (name == "partial_rotary_factor" and value == 1):
                continue
            if name in found and found[name][1] != value:
                raise UserError(
                    f"{name} is {found[name][1]!r} in {found[name][0]} and {value!r} in {place}; keep the right one"
                )
            found[name] = (place, value)
    values = {name: value for name, (_, value) in found.items()}
    own = defaults["rope_parameters"]
    if own and not spellings:
        if any(name not in own or own[name] != value for name, value in values.items()):
            raise UserError(
                f"{values} alone is ignored by this model's class, which takes rope_parameters={own}; "
                "write rope_parameters into config.json"
            )
        return dict(own)
    return {"rope_type": "default", "rope_theta": defaults["rope_theta"]} | values
