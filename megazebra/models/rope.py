"""Rotary position embedding (Su et al. 2021) and the ways to stretch it.

Half-rotation convention, as in Hugging Face's Llama: dimension i turns together with i + D/2.
Legend: B batch, S sequence, H heads, D head dim.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from megazebra.config.schema import RopeConfig
from megazebra.models.elementwise import rotate


def inverse_frequencies(rope: RopeConfig, head_dim: int, seq_len: int) -> tuple[Tensor, float]:
    """Frequencies [D/2] in float64 (radians per token), and the factor on cos and sin.

    `seq_len` is the length trained at or served; only longrope reads it, to choose between its two factor
    lists. The formulas: linear (Chen et al. 2023), ntk (NTK-aware theta), abf (Xiong et al. 2023), yarn
    (Peng et al. 2023, section 3.4), llama3 (Llama 3.1's by wavelength), longrope (Ding et al. 2024).
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    frequencies = rope.theta**-exponents
    s, original = rope.factor, rope.original_max_position_embeddings
    attention_factor = 1.0
    match rope.scaling:
        case "linear":
            frequencies = frequencies / s
        case "ntk":
            frequencies = (rope.theta * s ** (head_dim / (head_dim - 2))) ** -exponents
        case "abf":
            assert rope.abf_theta is not None
            frequencies = rope.abf_theta**-exponents
        case "yarn":
            assert original is not None
            frequencies = _yarn(frequencies, rope, head_dim, original)
            attention_factor = 0.1 * math.log(s) + 1.0
        case "llama3":
            assert original is not None
            frequencies = _llama3(frequencies, rope, original)
        case "longrope":
            assert original is not None
            divisors = rope.long_factor if seq_len > original else rope.short_factor
            frequencies = frequencies / torch.tensor(divisors, dtype=torch.float64)
            attention_factor = math.sqrt(1 + math.log(s) / math.log(original)) if s > 1 else 1.0
    return frequencies, rope.attention_factor if rope.attention_factor is not None else attention_factor


def _yarn(frequencies: Tensor, rope: RopeConfig, head_dim: int, original: int) -> Tensor:
    def dimension(turns: float) -> float:
        """The dimension pair that makes this many turns over the original length."""
        return head_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low = max(math.floor(dimension(rope.beta_fast)), 0)
    high = min(math.ceil(dimension(rope.beta_slow)), head_dim - 1)
    # A span of zero would divide by zero; the reference implementations widen it by the same amount.
    span = max(high - low, 0.001)
    kept = 1 - ((torch.arange(head_dim // 2, dtype=torch.float64) - low) / span).clamp(0, 1)
    return frequencies / rope.factor * (1 - kept) + frequencies * kept


def _llama3(frequencies: Tensor, rope: RopeConfig, original: int) -> Tensor:
    low, high = rope.low_freq_factor, rope.high_freq_factor
    turns = original * frequencies / (2 * math.pi)  # over the original length
    blend = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - blend) * frequencies / rope.factor + blend * frequencies


@functools.lru_cache(maxsize=64)  # else every forward pass would wait for a copy from the host
def _frequencies_on(device: torch.device, rope: RopeConfig, head_dim: int, seq_len: int) -> tuple[Tensor, float]:
    frequencies, factor = inverse_frequencies(rope, head_dim, seq_len)
    return frequencies.to(device), factor


def cos_sin(rope: RopeConfig, head_dim: int, positions_BS: Tensor, seq_len: int) -> tuple[Tensor, Tensor]:
    """cos and sin [B, S, 1, D/2] in float32 for int64 positions [B, S].

    Angles are formed in float64: at position 100,000 a float32 product is already off by 0.004 radians.
    """
    frequencies, factor = _frequencies_on(positions_BS.device, rope, head_dim, seq_len)
    angles = positions_BS[:, :, None, None].double() * frequencies
    return (angles.cos() * factor).float(), (angles.sin() * factor).float()


Rotate = Callable[[Tensor, Tensor, Tensor], Tensor]


def apply_rope(x_BSHD: Tensor, cos_sin: tuple[Tensor, Tensor] | None, rotate: Rotate = rotate) -> Tensor:
    """Queries or keys [B, S, H, D] rotated by `cos_sin`, in their own dtype; None (NoPE) leaves them.

    rotate: the function that does it, as `elementwise.rotate`.
    """
    return x_BSHD if cos_sin is None else rotate(x_BSHD, *cos_sin)
