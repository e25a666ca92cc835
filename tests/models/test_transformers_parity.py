"""The same weights in Hugging Face's models give the same logits and gradients. Names need no translation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    CwmConfig,
    CwmForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward
from zebras import make_model, random_tokens, small_config

from megazebra.attention.backend import load_backend
from megazebra.config import ModelConfig, RopeConfig
from megazebra.labels import IGNORE_INDEX
from megazebra.models.initialization import load_full_weights
from megazebra.models.zebra import ZebraModel
from megazebra.parallel.mesh import Group
from megazebra.pattern import AttentionSpec

BATCH, LENGTH, WINDOW = 2, 40, 7  # several windows

# Both sides are float32 (unit roundoff 6e-8) and differ in the order of sums. A layer's sums of up to 40 terms
# of size one are off by 40 * 6e-8 = 2e-6 at worst; ten such layers (projections and attention of four blocks)
# feed into each other, and logits are of size one: 5e-5 leaves a factor of two.
LOGITS = {"rtol": 0.0, "atol": 5e-5}

LLAMA3 = RopeConfig(
    theta=500000.0,
    scaling="llama3",
    factor=8.0,
    original_max_position_embeddings=32,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
)
LLAMA3_OF_TRANSFORMERS = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 32,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
PLAIN_OF_TRANSFORMERS = {"rope_type": "default", "rope_theta": 10000.0}


def _shared(config: ModelConfig, rope: dict[str, Any]) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "tie_word_embeddings": config.tie_word_embeddings,
        "rope_parameters": rope,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "attn_implementation": "eager",
    }


def _layer_types(config: ModelConfig) -> list[str]:
    return ["sliding_attention" if spec.is_local else "full_attention" for spec in config.attention_specs()]


def _llama(**changes: Any) -> tuple[ModelConfig, PreTrainedModel]:
    rope = changes.pop("rope_global", RopeConfig())
    config = small_config(pattern="G", rope_global=rope, **changes)
    theirs = LlamaConfig(
        attention_bias=config.attention_bias,
        mlp_bias=config.mlp_bias,
        **_shared(config, LLAMA3_OF_TRANSFORMERS if rope is LLAMA3 else PLAIN_OF_TRANSFORMERS),
    )
    return config, LlamaForCausalLM(theirs)


def _cwm(**changes: Any) -> tuple[ModelConfig, PreTrainedModel]:
    config = small_config(pattern="GLLL", window=WINDOW, rope_global=LLAMA3, rope_local=LLAMA3, **changes)
    theirs = CwmConfig(
        sliding_window=WINDOW, layer_types=_layer_types(config), **_shared(config, LLAMA3_OF_TRANSFORMERS)
    )
    return config, CwmForCausalLM(theirs)


def _qwen3(pattern: str) -> tuple[ModelConfig, PreTrainedModel]:
    # Heads wider than hidden / heads, as Qwen3's are.
    config = small_config(pattern=pattern, window=WINDOW, qk_norm=True, head_dim=16, rms_norm_eps=1e-6)
    theirs = Qwen3Config(
        use_sliding_window=True,
        sliding_window=WINDOW,
        layer_types=_layer_types(config),
        **_shared(config, PLAIN_OF_TRANSFORMERS),
    )
    return config, Qwen3ForCausalLM(theirs)


CASES = {
    "llama": lambda: _llama(),
    "llama-all-heads": lambda: _llama(num_kv_heads=None),
    "llama-biases": lambda: _llama(attention_bias=True, mlp_bias=True, num_kv_heads=1),
    "llama-tied": lambda: _llama(tie_word_embeddings=True),
    "llama-llama3": lambda: _llama(rope_global=LLAMA3),
    "cwm": lambda: _cwm(),
    "cwm-tied": lambda: _cwm(tie_word_embeddings=True, head_dim=16),
    "qwen3": lambda: _qwen3("G"),
    "qwen3-window": lambda: _qwen3("LLG"),
}


@torch.no_grad()
def _fill(model: nn.Module) -> None:
    """Random weights everywhere: Hugging Face starts norms at one and biases at zero, which would hide them."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        scale = parameter.shape[-1] ** -0.5 if parameter.ndim == 2 else 0.3
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale + name.endswith("norm.weight"))


def _both(case: str, backend: str) -> tuple[ModelConfig, ZebraModel, PreTrainedModel]:
    config, theirs = CASES[case]()
    _fill(theirs)
    ours = make_model(config, backend=backend)
    load_full_weights(ours, dict(theirs.named_parameters()), ours.mesh.tp)
    return config, ours, theirs.train()


@pytest.mark.parametrize("backend", ["blocked", "reference"])
@pytest.mark.parametrize("case", CASES)
def test_logits(case: str, backend: str) -> None:
    config, ours, theirs = _both(case, backend)
    tokens, _ = random_tokens(config, BATCH, LENGTH)
    with torch.no_grad():
        expected = theirs(tokens, use_cache=False).logits
        assert expected.abs().max() > 1, "of size one, so that the tolerance means something"
        torch.testing.assert_close(ours(tokens), expected, **LOGITS)


@pytest.mark.parametrize("case", ["llama-biases", "llama-tied", "cwm"])
def test_loss_and_gradients(case: str) -> None:
    config, ours, theirs = _both(case, "blocked")
    tokens, labels = random_tokens(config, BATCH, LENGTH)
    logits = theirs(tokens, use_cache=False).logits
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum", ignore_index=IGNORE_INDEX)
    expected.backward()
    loss = ours(tokens, labels)
    loss.backward()
    # A sum of 67 token losses, each off by twice what a logit is.
    torch.testing.assert_close(loss, expected, rtol=0, atol=67 * 2 * LOGITS["atol"])
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    assert set(gradients) == {name for name, _ in ours.named_parameters()}
    for name, parameter in ours.named_parameters():
        # The same error as a logit's relative to the weight's largest gradient, doubled for the way back.
        largest = gradients[name].abs().max().item()
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=0, atol=2 * LOGITS["atol"] * largest)


@pytest.mark.parametrize("case", ["llama-tied", "cwm-tied"])
def test_a_tied_output_layer_may_be_given_or_absent(case: str) -> None:
    config, theirs = CASES[case]()
    ours = make_model(config)
    weights = dict(theirs.state_dict())
    assert "lm_head.weight" in weights
    load_full_weights(ours, weights, ours.mesh.tp)
    del weights["lm_head.weight"]
    load_full_weights(ours, weights, ours.mesh.tp)
    assert ours.lm_head.weight is ours.model.embed_tokens.weight


class _GptOssLayer(nn.Module):
    """What gpt-oss's attention reads of its module."""

    def __init__(self, sinks_H: Tensor, groups: int) -> None:
        super().__init__()
        self.sinks = sinks_H
        self.num_key_value_groups = groups


@pytest.mark.parametrize("backend", ["blocked", "reference"])
def test_sinks_are_those_of_gpt_oss(backend: str) -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(BATCH, LENGTH, 4, 8, generator=generator)
    k, v = torch.randn(2, BATCH, LENGTH, 2, 8, generator=generator)
    sinks = torch.randn(4, generator=generator)
    positions = torch.arange(LENGTH)
    distance = positions[:, None] - positions
    mask = torch.zeros(LENGTH, LENGTH).masked_fill(
        (distance < 0) | (distance >= WINDOW), torch.finfo(torch.float32).min
    )
    theirs, _ = eager_attention_forward(
        _GptOssLayer(sinks, 2), q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask, scaling=8**-0.5
    )
    spec = AttentionSpec(window=WINDOW, rope=RopeConfig(), sinks=True)
    ours = load_backend(backend).attend(q, k, v, spec=spec, sinks_H=sinks)
    # Means of values of size one with weights whose logits are sums of 8 float32 products: 8 * 6e-8, a few times.
    torch.testing.assert_close(ours, theirs, rtol=0, atol=4e-6)


def test_every_rank_of_a_wider_group_would_load_its_own_part() -> None:
    """Loading slices whole weights: the second of two ranks gets the second half, padding is zero."""
    config, theirs = CASES["llama"]()
    ours = make_model(config)
    tp = Group("tp", (0, 1), 1)
    mesh = type(ours.mesh)(**{**vars(ours.mesh), "tp": tp})
    half = ZebraModel(config, mesh, ours.runtime)
    load_full_weights(half, dict(theirs.named_parameters()), tp)
    weights = theirs.state_dict()
    layer = "model.layers.1."
    for name, dim in [("self_attn.q_proj", 0), ("self_attn.o_proj", 1), ("mlp.up_proj", 0), ("mlp.down_proj", 1)]:
        own = half.get_parameter(f"{layer}{name}.weight")
        assert torch.equal(own, weights[f"{layer}{name}.weight"].chunk(2, dim)[1])
    assert torch.equal(half.lm_head.weight[:-1], weights["lm_head.weight"][31:])
    assert not half.lm_head.weight[-1].any()
