"""Operation and parameter counts, against counting."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from megazebra.attention.backend import resolve_backend
from megazebra.attention.packing import Packing
from megazebra.attention.reference import visible
from megazebra.config import ModelConfig, ParallelConfig
from megazebra.models.initialization import initialize
from megazebra.models.runtime import ModelRuntime
from megazebra.models.zebra import ZebraModel
from megazebra.parallel.mesh import ParallelMesh
from megazebra.plan.flops import attention_pairs, parameter_count, training_flops

SMALL: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 32,
    "ffn_hidden_size": 40,
    "num_attention_heads": 4,
    "num_kv_heads": 2,
    "vocab_size": 61,
    "window": 5,
}
BATCH, LENGTH = 2, 24


def _product(_added: list[int], left: list[int], right: list[int], **_: Any) -> int:
    return 2 * math.prod(left) * right[-1]


IN_PLACE = {torch.ops.aten.addmm_: _product, torch.ops.aten.baddbmm_: _product}  # torch's counter misses these


def _config(**changes: Any) -> ModelConfig:
    return ModelConfig.model_validate(SMALL | changes)


def _model(config: ModelConfig, backend: str = "reference") -> ZebraModel:
    choice = resolve_backend(
        backend, config.attention_specs(), head_dim=config.head_size, dtype=torch.float32, device=torch.device("cpu")
    )
    mesh = ParallelMesh.build(ParallelConfig())
    model = ZebraModel(config, mesh, ModelRuntime(backend=choice, loss_chunk=10))
    initialize(model, config, 0, mesh.tp)
    return model


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=5), st.one_of(st.none(), st.integers(1, 14)))
def test_attention_pairs_by_counting(lengths: list[int], window: int | None) -> None:
    by_hand = sum(
        1
        for length in lengths
        for query in range(length)
        for key in range(length)
        if key <= query and (window is None or query - key < window)
    )
    assert attention_pairs(lengths, window) == by_hand
    # And those the attention mask lets through.
    packing = Packing.from_document_lengths([lengths])
    mask = visible(sum(lengths), sum(lengths), window, packing, torch.device("cpu"))
    assert attention_pairs(iter(lengths), window) == int(mask.sum())


CONFIGS = {
    "full": {"pattern": "G"},
    "all-heads": {"pattern": "G", "num_kv_heads": None},
    "wide-heads": {"pattern": "G", "head_dim": 16},
    "tied": {"pattern": "G", "tie_word_embeddings": True},
    "small": {"pattern": "G", "attention_bias": True, "mlp_bias": True, "qk_norm": True, "attention_sinks": "all"},
}


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
def test_training_flops_of_full_attention_are_those_done(changes: dict[str, Any]) -> None:
    config = _config(**changes)
    tokens = torch.randint(0, config.vocab_size, (BATCH, LENGTH))
    with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter:
        _model(config)(tokens, tokens).backward()
    # The reference computes all pairs of a row and masks half of them.
    per_pair = 3 * 4 * config.num_attention_heads * config.head_size
    masked = config.num_layers * BATCH * (LENGTH**2 - LENGTH * (LENGTH + 1) // 2)
    assert training_flops(config, [LENGTH] * BATCH) == counter.get_total_flops() - per_pair * masked


@pytest.mark.parametrize("pattern", ["GLLL", "LLLL", "GGLL", ("G", 3, 9, "L")])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("lengths", [[24], [5, 1, 18]])
def test_training_flops_of_a_pattern_by_counting(pattern: Any, tied: bool, lengths: list[int]) -> None:
    config = _config(pattern=pattern, tie_word_embeddings=tied)
    model = _model(config)
    # Every linear layer multiplies each token with each weight once forward and twice backward.
    layers = [m for m in model.modules() if isinstance(getattr(m, "weight", None), nn.Parameter) and m.weight.ndim == 2]
    weights = sum(layer.weight.numel() for layer in layers if layer is not model.model.embed_tokens)
    pairs = 0
    for spec in config.attention_specs():
        for length in lengths:
            for query in range(length):
                pairs += min(query + 1, spec.window or length)
    heads = config.num_attention_heads * config.head_size
    by_hand = 3 * (2 * weights * sum(lengths) + 2 * 2 * heads * pairs)
    assert training_flops(config, iter(lengths)) == by_hand


def test_a_window_beyond_the_sequence_costs_what_full_attention_does() -> None:
    assert training_flops(_config(pattern="GLLL", window=LENGTH), [LENGTH]) == training_flops(
        _config(pattern="G"), [LENGTH]
    )


@pytest.mark.parametrize("attention_bias", [False, True])
@pytest.mark.parametrize("mlp_bias", [False, True])
@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("sinks", ["none", "all", "local"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shape", [{}, {"num_kv_heads": None, "head_dim": 10}, {"pattern": ["L", 3, "L", "G"]}])
def test_parameter_count_is_the_models(
    attention_bias: bool, mlp_bias: bool, qk_norm: bool, sinks: str, tied: bool, shape: dict[str, Any]
) -> None:
    config = _config(
        attention_bias=attention_bias,
        mlp_bias=mlp_bias,
        qk_norm=qk_norm,
        attention_sinks=sinks,
        tie_word_embeddings=tied,
        **shape,
    )
    with torch.device("meta"):
        model = ZebraModel(config, ParallelMesh.build(ParallelConfig()), ModelRuntime(backend=None))
    assert parameter_count(config) == sum(parameter.numel() for parameter in model.parameters())


def test_parameter_count_of_a_known_model() -> None:
    llama_2_7b = ModelConfig()
    assert parameter_count(llama_2_7b) == 6_738_415_616
