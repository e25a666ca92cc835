"""Which strategy each kind of layer takes: the one asked for, or the one that receives least. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from megazebra.config.schema import Config
from megazebra.context.traffic import STRATEGIES, Received, Shape, busiest
from megazebra.pattern import AttentionSpec


@dataclass(frozen=True)
class Option:
    """One strategy for one kind of layer: what its busiest rank receives, or why it can't serve."""

    name: str
    received: Received | None
    refusal: str | None


def layer_shape(config: Config) -> Shape:
    """The attention of one layer under this configuration, its sequences padded as `sequence_multiple` says."""
    multiple = sequence_multiple(config)
    return Shape(
        batch=config.train.micro_batch_size,
        seq_len=-(-config.data.seq_len // multiple) * multiple,
        heads=config.model.num_attention_heads // config.parallel.tensor,
        kv_heads=config.model.kv_heads // config.parallel.tensor,
        head_dim=config.model.head_size,
        ranks=config.parallel.context,
        element_bytes=2 if config.train.precision == "bf16" else 4,
    )


def sequence_multiple(config: Config) -> int:
    """Sequences are padded to a multiple of this: equal shards for the context-parallel ranks, and inside of them
    for the tensor-parallel ranks where those split the residual stream.
    """
    parallel = config.parallel
    return parallel.context * (parallel.tensor if parallel.sequence_parallel else 1)


def options(spec: AttentionSpec, shape: Shape) -> list[Option]:
    """Every strategy, as it would serve layers of this spec."""
    found = []
    for name in STRATEGIES:
        refusal = _refusal(name, spec, shape)
        found.append(Option(name, None if refusal else busiest(name, spec, shape), refusal))
    return found


def resolve_specs(config: Config) -> tuple[AttentionSpec, ...]:
    """One AttentionSpec per layer, each naming its strategy.

    Raises ValueError when a strategy asked for in `parallel` can't serve its layers.
    """
    specs = config.model.attention_specs()
    if config.parallel.context == 1:
        return specs
    shape = layer_shape(config)
    chosen = {spec: _choose(spec, shape, _asked(config, spec)) for spec in dict.fromkeys(specs)}
    return tuple(replace(spec, context=chosen[spec]) for spec in specs)


def _asked(config: Config, spec: AttentionSpec) -> str:
    return config.parallel.context_local if spec.is_local else config.parallel.context_global


@lru_cache(maxsize=256)  # the planner asks for every layout, several times
def _choose(spec: AttentionSpec, shape: Shape, asked: str) -> str:
    found = options(spec, shape)
    if asked == "auto":
        able = [option for option in found if option.received is not None]
        return min(able, key=lambda option: option.received.total if option.received else 0).name
    option = next(option for option in found if option.name == asked)
    if option.refusal:
        raise ValueError(f"parallel.context_{spec.kind}={asked} can't serve here: {option.refusal}; set it to auto")
    return asked


def _refusal(name: str, spec: AttentionSpec, shape: Shape) -> str | None:
    if name == "halo" and spec.window is None:
        return "global layers have no window"
    if name == "ulysses" and shape.heads % shape.ranks:
        return f"parallel.context={shape.ranks} does not divide the {shape.heads} query heads of a tensor-parallel rank"
    return None


def strategy_table(config: Config, specs: Sequence[AttentionSpec]) -> Iterator[str]:
    """Lines that say what each kind of layer takes, and what that and the alternatives make a rank receive."""
    shape = layer_shape(config)
    yield f"context  {shape.ranks} ranks of {shape.local_len:,} tokens; a layer receives, forward + backward:"
    for spec in dict.fromkeys(specs):
        kind = f"local {spec.window}" if spec.is_local else "global"
        named = {option.name: option for option in options(spec, shape)}
        layers = f"{specs.count(spec)} {kind} layer{'s' if specs.count(spec) > 1 else ''}"
        line = f"  {layers}: {_in_words(named.pop(spec.context))}"
        yield f"{line} (not {'; '.join(_in_words(other) for other in named.values() if _is_news(other, spec))})"


def _in_words(option: Option) -> str:
    if option.received is None:
        return f"{option.name}, as {option.refusal}"
    return f"{option.name} {option.received.forward / 1e6:,.2f} + {option.received.backward / 1e6:,.2f} MB"


def _is_news(option: Option, spec: AttentionSpec) -> bool:
    """Nobody expects a halo of a layer without a window."""
    return spec.is_local or option.name != "halo"
