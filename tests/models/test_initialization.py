"""Initial weights, the same under every layout, and loading that names every misfit."""

from __future__ import annotations

import math

import pytest
import torch
from support.distributed import run_distributed
from torch import Tensor
from zebras import make_model, small_config

from megazebra.config import ModelConfig, ParallelConfig
from megazebra.models.initialization import full_weights, initialize, load_full_weights
from megazebra.parallel.mesh import ParallelMesh

# All kinds of weights; four heads of both kinds, so that four ranks can share them; 61 tokens pad.
EVERYTHING = small_config(
    num_layers=2, pattern="GL", num_kv_heads=4, qk_norm=True, attention_bias=True, mlp_bias=True, attention_sinks="all"
)


def _initialized(config: ModelConfig, tensor: int, seed: int) -> dict[str, Tensor]:
    mesh = ParallelMesh.build(ParallelConfig(tensor=tensor))
    model = make_model(config, mesh)
    initialize(model, config, seed, mesh.tp)
    return full_weights(model, mesh.tp)


def _under_every_tensor_size() -> list[dict[str, Tensor]]:
    return [_initialized(EVERYTHING, tensor, seed=7) for tensor in (1, 2, 4)]


def test_independent_of_the_layout() -> None:
    expected = _initialized(EVERYTHING, 1, seed=7)
    for layouts in run_distributed(_under_every_tensor_size, 4):
        for weights in layouts:
            assert weights.keys() == expected.keys()
            for name, weight in weights.items():
                assert torch.equal(weight, expected[name]), name


def test_distribution() -> None:
    config = small_config(hidden_size=128, ffn_hidden_size=256, vocab_size=500, num_layers=8, init_std=0.05)
    for name, weight in _initialized(config, 1, seed=1).items():
        if name.endswith("norm.weight"):
            assert weight.eq(1).all()
            continue
        std = 0.05 / math.sqrt(2 * 8) if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.05
        # n normal numbers: their deviation is off by std / sqrt(2 n), their mean by std / sqrt(n); five of these.
        n = weight.numel()
        assert weight.std().item() == pytest.approx(std, rel=5 / math.sqrt(2 * n)), name
        assert abs(weight.mean().item()) < 5 * std / math.sqrt(n), name


def test_vectors_and_seeds() -> None:
    first, again, other = (_initialized(EVERYTHING, 1, seed) for seed in (1, 1, 2))
    for name, weight in first.items():
        assert torch.equal(weight, again[name])
        if weight.ndim == 1:
            assert weight.eq(1.0 if name.endswith("norm.weight") else 0.0).all(), name
        else:
            assert not torch.equal(weight, other[name]), name
    matrices = [weight.flatten()[:8] for weight in first.values() if weight.ndim == 2]
    assert len({tuple((row / row.norm()).tolist()) for row in matrices}) == len(matrices), "a stream for each weight"


def test_another_weight_changes_none() -> None:
    """Options that add or remove weights leave the others' initial values alone."""
    few = small_config(num_layers=2, pattern="GL", num_kv_heads=4)
    many = _initialized(EVERYTHING, 1, seed=3)
    for name, weight in _initialized(few, 1, seed=3).items():
        assert torch.equal(weight, many[name]), name


def test_tied_output_layer_is_one_weight() -> None:
    weights = _initialized(small_config(tie_word_embeddings=True), 1, seed=3)
    assert "lm_head.weight" not in weights
    assert weights["model.embed_tokens.weight"].shape == (61, 32)


def test_loading_names_every_problem_at_once() -> None:
    model = make_model(EVERYTHING)
    before = {name: weight.clone() for name, weight in full_weights(model, model.mesh.tp).items()}
    weights = dict(before)
    del weights["model.norm.weight"], weights["model.layers.0.mlp.up_proj.weight"]
    weights["model.layers.2.mlp.up_proj.weight"] = torch.zeros(1)
    weights["rope.inv_freq"] = torch.zeros(1)
    weights["lm_head.weight"] = torch.zeros(64, 32)  # padded by somebody else
    with pytest.raises(ValueError, match="weights do not fit the model: ") as raised:
        load_full_weights(model, weights, model.mesh.tp)
    message = str(raised.value)
    for problem in (
        "missing model.norm.weight",
        "missing model.layers.0.mlp.up_proj.weight",
        "unexpected model.layers.2.mlp.up_proj.weight",
        "unexpected rope.inv_freq",
        "lm_head.weight has shape (64, 32), the model needs (61, 32)",
    ):
        assert problem in message
    assert message.count(";") == 4, "and no other"
    load_full_weights(model, before, model.mesh.tp)


def test_a_tied_output_layer_that_differs_is_refused() -> None:
    model = make_model(small_config(tie_word_embeddings=True))
    weights = full_weights(model, model.mesh.tp)
    load_full_weights(model, weights | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}, model.mesh.tp)
    with pytest.raises(ValueError, match=r"lm_head.weight differs from model.embed_tokens.weight.*tie_word_embeddings"):
        load_full_weights(model, weights | {"lm_head.weight": torch.zeros(61, 32)}, model.mesh.tp)


def test_loading_converts_the_dtype() -> None:
    model = make_model(small_config())
    weights = {name: weight.bfloat16() for name, weight in full_weights(model, model.mesh.tp).items()}
    load_full_weights(model, weights, model.mesh.tp)
    for name, weight in full_weights(model, model.mesh.tp).items():
        assert weight.dtype == torch.float32
        assert torch.equal(weight, weights[name].float())
