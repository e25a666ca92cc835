"""Rotary embedding: frequencies of every scaling kind, and the rotation."""

from __future__ import annotations

import math
from decimal import Decimal, localcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from megazebra.config import RopeConfig
from megazebra.models.rope import apply_rope, cos_sin, inverse_frequencies

# transformers computes theta^x in float32. Its x is off by 6e-8 x, and with it the frequency by ln(theta) * 6e-8,
# which is 8e-7 for theta 500,000; the power and the division add an ulp each.
FREQUENCY_TOLERANCE = {"rtol": 1.5e-6, "atol": 0.0}

D = 32
FACTORS = tuple(1 + 0.25 * i for i in range(D // 2))
LONGER_FACTORS = tuple(2 + i for i in range(D // 2))
SAME_IN_TRANSFORMERS = [
    pytest.param({"theta": 10000.0}, {"rope_type": "default"}, id="none"),
    pytest.param({"theta": 500000.0, "scaling": "linear"}, {"rope_type": "linear"}, id="linear"),
    pytest.param({"scaling": "yarn"}, {"rope_type": "yarn"}, id="yarn"),
    pytest.param(
        {"scaling": "yarn", "beta_fast": 8.0, "beta_slow": 2.0, "attention_factor": 1.7, "theta": 150000.0},
        {"rope_type": "yarn", "beta_fast": 8.0, "beta_slow": 2.0, "attention_factor": 1.7},
        id="yarn-options",
    ),
    pytest.param({"scaling": "yarn", "factor": 1.0}, {"rope_type": "yarn"}, id="yarn-factor-1"),
    pytest.param({"scaling": "yarn", "beta_fast": 2.0, "beta_slow": 2.0}, {"rope_type": "yarn"}, id="yarn-step"),
    pytest.param(
        {"scaling": "llama3", "theta": 500000.0, "factor": 8.0},
        {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        id="llama3",
    ),
    pytest.param(
        {"scaling": "llama3", "factor": 32.0, "low_freq_factor": 2.0, "high_freq_factor": 16.0},
        {"rope_type": "llama3", "low_freq_factor": 2.0, "high_freq_factor": 16.0},
        id="llama3-options",
    ),
]


def _llama_config(parameters: dict[str, Any], **more: Any) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=4 * D, num_attention_heads=4, head_dim=D, rope_parameters=parameters, vocab_size=8, **more
    )


@pytest.mark.parametrize(("ours", "theirs"), SAME_IN_TRANSFORMERS)
def test_frequencies_are_those_of_transformers(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    rope = RopeConfig.model_validate({"factor": 4.0, "original_max_position_embeddings": 2048} | ours)
    parameters = {"rope_theta": rope.theta} | theirs
    if theirs["rope_type"] != "default":
        parameters["factor"] = rope.factor
    if theirs["rope_type"] in ("yarn", "llama3"):
        parameters["original_max_position_embeddings"] = 2048
    if theirs["rope_type"] == "yarn":
        parameters |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow}
    module = LlamaRotaryEmbedding(_llama_config(parameters, max_position_embeddings=8192))
    frequencies, factor = inverse_frequencies(rope, D, seq_len=8192)
    assert frequencies.dtype == torch.float64
    torch.testing.assert_close(frequencies.float(), module.inv_freq, **FREQUENCY_TOLERANCE)
    assert factor == pytest.approx(module.attention_scaling, rel=1e-12)

    positions_BS = torch.tensor([[0, 1, 2, 3, 63], [5, 0, 1, 0, 40]])
    cos, sin = cos_sin(rope, D, positions_BS, seq_len=8192)
    their_cos, their_sin = module(torch.zeros(1), positions_BS)
    assert cos.dtype == sin.dtype == torch.float32
    # Angles up to 63 with the frequencies' relative error, times a factor below 2: 63 * 1.5e-6 * 1.7.
    for own, their in ((cos, their_cos), (sin, their_sin)):
        torch.testing.assert_close(torch.cat([own, own], -1)[:, :, 0], their, rtol=0, atol=2e-4)


@pytest.mark.parametrize("seq_len", [2048, 2049])  # fits the original length, and is beyond it
@pytest.mark.parametrize("factor", [1.0, 4.0])
def test_longrope_is_that_of_transformers(seq_len: int, factor: float) -> None:
    lists = {"short_factor": FACTORS, "long_factor": LONGER_FACTORS}
    rope = RopeConfig(scaling="longrope", factor=factor, original_max_position_embeddings=2048, **lists)
    parameters = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "factor": factor,
        "original_max_position_embeddings": 2048,
    } | {name: list(values) for name, values in lists.items()}
    config = _llama_config(parameters, max_position_embeddings=int(2048 * factor))
    theirs, their_factor = ROPE_INIT_FUNCTIONS["longrope"](config, torch.device("cpu"), seq_len=seq_len)
    frequencies, own_factor = inverse_frequencies(rope, D, seq_len)
    torch.testing.assert_close(frequencies.float(), theirs, **FREQUENCY_TOLERANCE)
    assert own_factor == pytest.approx(their_factor, rel=1e-12)
    divisors = FACTORS if seq_len == 2048 else LONGER_FACTORS
    assert frequencies[3].item() == pytest.approx(10000.0 ** (-6 / D) / divisors[3], rel=1e-14)


def test_ntk() -> None:
    rope = RopeConfig(scaling="ntk", theta=10000.0, factor=8.0)
    frequencies, factor = inverse_frequencies(rope, D, seq_len=1)
    base = 10000.0 * 8.0 ** (D / (D - 2))
    # float64: a power's relative error is its exponent's, ln(1e5) * 1.1e-16, and a few ulp.
    assert frequencies.tolist() == pytest.approx([base ** (-2 * i / D) for i in range(D // 2)], rel=1e-14)
    assert factor == 1
    # The fastest turns as before and the slowest exactly `factor` times slower: what NTK-aware means.
    assert frequencies[0] == 1
    assert frequencies[-1].item() == pytest.approx(10000.0 ** (-(D - 2) / D) / 8.0, rel=1e-14)
    # transformers has the dynamic kind: with factor 1 and a sequence s times the maximum it is ours with factor s.
    config = _llama_config({"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 1.0}, max_position_embeddings=1024)
    theirs, _ = ROPE_INIT_FUNCTIONS["dynamic"](config, torch.device("cpu"), seq_len=8 * 1024)
    torch.testing.assert_close(frequencies.float(), theirs, **FREQUENCY_TOLERANCE)


def test_abf() -> None:
    rope = RopeConfig(scaling="abf", theta=10000.0, factor=4.0, abf_theta=500000.0)
    frequencies, factor = inverse_frequencies(rope, D, seq_len=1)
    assert frequencies.tolist() == pytest.approx([500000.0 ** (-2 * i / D) for i in range(D // 2)], rel=1e-14)
    assert factor == 1


@pytest.mark.parametrize("scaling", ["yarn", "longrope"])
def test_attention_factor_is_the_users(scaling: str) -> None:
    rope = RopeConfig.model_validate(
        {
            "scaling": scaling,
            "factor": 4.0,
            "original_max_position_embeddings": 2048,
            "short_factor": FACTORS,
            "long_factor": FACTORS,
            "attention_factor": 1.25,
        }
    )
    assert inverse_frequencies(rope, D, seq_len=1)[1] == 1.25
    cos, _ = cos_sin(rope, D, torch.zeros(1, 1, dtype=torch.int64), seq_len=1)
    assert cos.unique().tolist() == [1.25]


def test_angles_are_right_far_out() -> None:
    """At position a million, against 50 decimal digits."""
    position = 1_000_003
    cos, sin = cos_sin(RopeConfig(), D, torch.tensor([[position]]), seq_len=1)
    with localcontext() as context:
        context.prec = 50
        two_pi = 2 * Decimal("3.14159265358979323846264338327950288419716939937510")
        for i in range(D // 2):
            angle = float(position * Decimal(10000) ** (Decimal(-2 * i) / D) % two_pi)
            # The float64 angle is off by a few 1.1e-16 * 1e6 = 1e-9; the result is rounded to float32: 6e-8.
            assert cos[0, 0, 0, i].item() == pytest.approx(math.cos(angle), abs=6.2e-8)
            assert sin[0, 0, 0, i].item() == pytest.approx(math.sin(angle), abs=6.2e-8)


def test_positions_restart_with_documents() -> None:
    whole = cos_sin(RopeConfig(), D, torch.arange(8)[None], seq_len=8)
    packed = cos_sin(RopeConfig(), D, torch.tensor([[0, 1, 2, 0, 1, 0, 7, 3]]), seq_len=8)
    for all_positions, some in zip(whole, packed, strict=True):
        assert some.shape == (1, 8, 1, D // 2)
        assert torch.equal(some[0], all_positions[0, [0, 1, 2, 0, 1, 0, 7, 3]])


def _table(dtype: torch.dtype, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    cos, sin = cos_sin(RopeConfig(), D, torch.arange(7).expand(2, 7) * 3, seq_len=7)
    return (cos * scale).to(dtype), (sin * scale).to(dtype)


def test_rotation_is_that_of_transformers() -> None:
    torch.manual_seed(0)
    cos, sin = _table(torch.float32)
    q, k = torch.randn(2, 7, 4, D), torch.randn(2, 7, 2, D)
    theirs = apply_rotary_pos_emb(q, k, torch.cat([cos, cos], -1)[:, :, 0], torch.cat([sin, sin], -1)[:, :, 0], 2)
    # Two products of numbers up to 4 and their sum, in which a fused multiply-add leaves out one rounding: 2^-24 * 4.
    for own, their in zip((apply_rope(q, (cos, sin)), apply_rope(k, (cos, sin))), theirs, strict=True):
        torch.testing.assert_close(own, their, rtol=1.2e-7, atol=2.4e-7)
    assert apply_rope(q, None) is q


def test_rotation_in_bf16_is_rounded_once() -> None:
    torch.manual_seed(0)
    cos_and_sin = _table(torch.float32, scale=1.3)
    x = torch.randn(2, 7, 4, D).bfloat16().requires_grad_()
    out = apply_rope(x, cos_and_sin)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, apply_rope(x.float(), cos_and_sin).bfloat16())
    grad = torch.randn_like(out)
    out.backward(grad)
    wide = x.detach().float().requires_grad_()
    apply_rope(wide, cos_and_sin).backward(grad.float())
    assert torch.equal(x.grad, wide.grad.bfloat16())


def test_gradient_of_the_rotation() -> None:
    torch.manual_seed(0)
    cos_and_sin = _table(torch.float64, scale=1.3)
    x = torch.randn(2, 7, 1, D, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: apply_rope(x, cos_and_sin), (x,))
    # Without a scale it is a rotation: it keeps lengths, and scores depend on the distance only.
    cos_and_sin = _table(torch.float64)
    rotated = apply_rope(x, cos_and_sin)
    # cos^2 + sin^2 of float32 numbers is within 2 * 6e-8 of one.
    torch.testing.assert_close(rotated.norm(dim=-1), x.norm(dim=-1), rtol=2e-7, atol=0)
    q, k = torch.randn(2, 1, 1, 1, D, dtype=torch.float64).expand(2, 1, 7, 1, D)
    q, k = apply_rope(q, _first_row(cos_and_sin)), apply_rope(k, _first_row(cos_and_sin))
    scores = torch.einsum("bshd,bthd->st", q, k)
    # The tables are rounded to float32: 32 products of size 1 to 10 with relative error 1.2e-7.
    torch.testing.assert_close(scores[1:, 1:], scores[:-1, :-1], rtol=0, atol=2e-5)


def _first_row(cos_and_sin: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return cos_and_sin[0][:1], cos_and_sin[1][:1]
