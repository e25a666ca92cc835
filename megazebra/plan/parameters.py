"""The weights of one tensor-parallel rank, by name and shape, without building a model. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from megazebra.config.schema import ModelConfig
from megazebra.pattern import AttentionSpec


@dataclass(frozen=True)
class Parameter:
    """name: Hugging Face's, as in the model. shape: of this rank's part."""

    name: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@lru_cache(maxsize=64)
def parameters(model: ModelConfig, tensor: int) -> tuple[Parameter, ...]:
    """In the model's own order; a tied output layer has none of its own. Vocabularies are padded to the ranks."""
    rows = -(-model.vocab_size // tensor)
    embedding = Parameter("model.embed_tokens.weight", (rows, model.hidden_size))
    layers = [
        Parameter(f"model.layers.{i}.{part.name}", part.shape)
        for i, spec in enumerate(model.attention_specs())
        for part in _block(model, spec, tensor)
    ]
    found = [embedding, *layers, Parameter("model.norm.weight", (model.hidden_size,))]
    if not model.tie_word_embeddings:
        found.append(Parameter("lm_head.weight", (rows, model.hidden_size)))
    return tuple(found)


def _block(model: ModelConfig, spec: AttentionSpec, tensor: int) -> Iterator[Parameter]:
    width, ffn = model.hidden_size, model.ffn_hidden_size // tensor
    heads, kv_heads, size = model.num_attention_heads // tensor, model.kv_heads // tensor, model.head_size
    yield Parameter("input_layernorm.weight", (width,))
    if spec.sinks:
        yield Parameter("self_attn.sinks", (heads,))
    for name, rows in (("q_proj", heads * size), ("k_proj", kv_heads * size), ("v_proj", kv_heads * size)):
        yield from _linear(f"self_attn.{name}", (rows, width), bias=model.attention_bias)
    yield from _linear("self_attn.o_proj", (width, heads * size), bias=model.attention_bias)
    if model.qk_norm:
        yield Parameter("self_attn.q_norm.weight", (size,))
        yield Parameter("self_attn.k_norm.weight", (size,))
    yield Parameter("post_attention_layernorm.weight", (width,))
    yield from _linear("mlp.gate_proj", (ffn, width), bias=model.mlp_bias)
    yield from _linear("mlp.up_proj", (ffn, width), bias=model.mlp_bias)
    yield from _linear("mlp.down_proj", (width, ffn), bias=model.mlp_bias)


def _linear(name: str, shape: tuple[int, int], *, bias: bool) -> Iterator[Parameter]:
    yield Parameter(f"{name}.weight", shape)
    if bias:
        yield Parameter(f"{name}.bias", shape[:1])
