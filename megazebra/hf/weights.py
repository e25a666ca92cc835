"""Whether weights on disk are those of a model."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import torch

from megazebra.checkpoint.store import CheckpointError
from megazebra.checkpoint.tensor_file import StoredTensor
from megazebra.config.schema import ModelConfig
from megazebra.plan.parameters import parameters

OUTPUT, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
SINKS = ".self_attn.sinks"
# A sink so far below any logit takes no weight at all: its share of the softmax rounds to zero. Exact in every dtype.
NO_SINK = -(2.0**14)
_BLOCK_ELEMENTS = 1 << 22
_SHOWN = 5


def check_weights(config: ModelConfig, shapes: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Raises CheckpointError naming missing, unexpected and wrongly shaped weights."""
    wanted = {parameter.name: parameter.shape for parameter in parameters(config, tensor=1)}
    problems = [f"missing {name}" for name in wanted if name not in shapes]
    problems += [f"unexpected {name}" for name in shapes if name not in wanted]
    problems += [
        f"{name} has shape {list(shapes[name])}, the configuration asks for {list(shape)}"
        for name, shape in wanted.items()
        if name in shapes and shapes[name] != shape
    ]
    if problems:
        mend = ""
        if problems == [f"missing {OUTPUT}"]:
            mend = "; set tie_word_embeddings to true if the output layer shares the embedding's weight"
        more = f" and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise CheckpointError(
            f"the weights in {where} do not fit its configuration: {'; '.join(problems[:_SHOWN])}{more}{mend}"
        )


def equal(one: StoredTensor, other: StoredTensor) -> bool:
    """Whether two stored tensors have the same values, without holding either."""
    if one.shape != other.shape:
        return False
    elements = prod(one.shape)
    starts = range(0, elements, _BLOCK_ELEMENTS)
    blocks = ((start, min(_BLOCK_ELEMENTS, elements - start)) for start in starts)
    return all(torch.equal(one.read(*block), other.read(*block)) for block in blocks)


def layer_of(name: str) -> int:
    """The number of the layer that a weight belongs to."""
    return int(name.removeprefix("model.layers.").partition(".")[0])


def absent_sinks(config: ModelConfig) -> list[str]:
    """Names that the sinks of layers without them have in a class where every layer has some."""
    specs = config.attention_specs()
    return [f"model.layers.{layer}{SINKS}" for layer, spec in enumerate(specs) if not spec.sinks]
