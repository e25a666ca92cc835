"""Floating-point operations of a step, counting only the key-query pairs a layer's window lets it see.

The convention is the field's (Kaplan et al. 2020; PaLM, Chowdhery et al. 2022, appendix B): matrix
products only, a multiply-add is 2 operations, backward costs twice forward, recomputation is not counted.
Attention pairs are counted exactly: causal, within the window, within the document. Imports no torch.

Per token and layer, forward: 2 x (weights of the projections); per visible pair: 4 x heads x head_dim
(scores and weighted values); the output layer: 2 x hidden x vocabulary per token.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

from megazebra.config.schema import ModelConfig


def attention_pairs(document_lengths: Iterable[int], window: int | None) -> int:
    """Pairs (query, key) that causal attention within documents sees; window counts the query itself."""
    pairs = 0
    for length in document_lengths:
        reach = length if window is None else min(window, length)
        pairs += reach * (reach + 1) // 2 + (length - reach) * reach
    return pairs


def layer_matrix_weights(model: ModelConfig) -> int:
    """Weights of one block's projections."""
    attention = 2 * model.hidden_size * model.head_size * (model.num_attention_heads + model.kv_heads)
    return attention + 3 * model.hidden_size * model.ffn_hidden_size


def parameter_count(model: ModelConfig) -> int:
    """All weights of the model, padding of the vocabulary not counted."""
    heads, kv_heads, size = model.num_attention_heads, model.kv_heads, model.head_size
    layer = layer_matrix_weights(model) + 2 * model.hidden_size
    if model.qk_norm:
        layer += 2 * size
    if model.attention_bias:
        layer += size * (heads + 2 * kv_heads) + model.hidden_size
    if model.mlp_bias:
        layer += 2 * model.ffn_hidden_size + model.hidden_size
    sinks = heads * sum(spec.sinks for spec in model.attention_specs())
    embeddings = model.vocab_size * model.hidden_size * (1 if model.tie_word_embeddings else 2)
    return model.num_layers * layer + sinks + embeddings + model.hidden_size


def training_flops(model: ModelConfig, document_lengths: Iterable[int]) -> int:
    """Operations of forward and backward over these documents (a row without documents is one)."""
    return training_flops_of(model)(document_lengths)


def training_flops_of(model: ModelConfig) -> Callable[[Iterable[int]], int]:
    """The same as a function of the documents, for those who ask often."""
    weights = model.num_layers * layer_matrix_weights(model) + model.hidden_size * model.vocab_size
    layers = Counter(spec.window for spec in model.attention_specs())

    def flops(document_lengths: Iterable[int]) -> int:
        lengths = list(document_lengths)
        pairs = sum(count * attention_pairs(lengths, window) for window, count in layers.items())
        return 3 * (2 * sum(lengths) * weights + 4 * model.num_attention_heads * model.head_size * pairs)

    return flops
