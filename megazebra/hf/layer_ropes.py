"""Which rotary embedding the global and the local layers of a config.json have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megazebra.config.schema import RopeConfig
from megazebra.errors import UserError
from megazebra.hf.families import Family
from megazebra.hf.rope import read_rope


def rope_of_kinds(family: Family, fields: Mapping[str, Any], symbols: Sequence[str | int]) -> dict[str, RopeConfig]:
    """`rope_global` and `rope_local` of a model whose layers are `symbols`.

    Raises UserError when layers of one kind differ, or an entry is none that we have.
    """
    if family.ropes == "by kind":
        return {f"rope_{kind}": _rope_of_kind(family, fields, f"{kind}_rope") for kind in ("global", "local")}
    shared = read_rope(fields, family.defaults)
    none = shared.model_copy(update={"enabled": False})
    if family.ropes == "same":
        return {"rope_global": shared, "rope_local": shared}
    told: Sequence[float]
    if family.ropes == "or none":
        field, told = "no_rope_layers", [int(has_rope) for has_rope in layers_with_rope(fields, len(symbols))]
        ropes = [shared if has_rope else none for has_rope in told]
    else:
        field, told = "layer_rope_theta", _layer_thetas(fields, len(symbols), shared.theta)
        ropes = [shared.model_copy(update={"theta": float(theta)}) if theta else none for theta in told]
    found = {}
    for kind in ("global", "local"):
        here = {rope for rope, symbol in zip(ropes, symbols, strict=True) if (symbol == "G") == (kind == "global")}
        if len(here) > 1:
            raise UserError(
                f"{field}={told} gives the {kind} layers of {''.join(map(str, symbols))} different rotary embeddings; "
                "choose a pattern whose layers of one kind have the same"
            )
        found[f"rope_{kind}"] = here.pop() if here else shared
    return found


def layers_with_rope(fields: Mapping[str, Any], layers: int) -> list[bool]:
    """Whether each layer of a class that reads `no_rope_layers` has a rotary embedding."""
    listed = fields.get("no_rope_layers")  # 1 where there is RoPE, despite its name
    if listed is not None:
        if not isinstance(listed, list) or len(listed) < layers:
            raise UserError(f"no_rope_layers={listed} must have an entry for each of num_hidden_layers={layers}")
        return [bool(has_rope) for has_rope in listed[:layers]]
    interval = fields.get("no_rope_layer_interval", 4)
    if not isinstance(interval, int) or interval < 1:
        raise UserError(f"no_rope_layer_interval={interval!r} must be a whole number >= 1; correct it")
    return [(i + 1) % interval != 0 for i in range(layers)]


def _layer_thetas(fields: Mapping[str, Any], layers: int, shared: float) -> list[float]:
    """The base of each layer, 0 where it has no rotary embedding."""
    listed = fields.get("layer_rope_theta") or [shared] * layers
    is_list = isinstance(listed, list) and len(listed) == layers
    if not is_list or not all(isinstance(theta, int | float) and theta >= 0 for theta in listed):
        raise UserError(f"layer_rope_theta={listed} must have a number >= 0 for each of num_hidden_layers={layers}")
    return listed


def _rope_of_kind(family: Family, fields: Mapping[str, Any], name: str) -> RopeConfig:
    if (rope := fields.get(name)) is None:
        return RopeConfig(enabled=False)
    if not isinstance(rope, dict):
        raise UserError(f'{name}={rope!r} must be null or an object such as {{"rope_theta": 10000.0}}')
    return read_rope({"rope_parameters": rope}, family.defaults)
