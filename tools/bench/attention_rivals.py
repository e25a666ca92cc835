"""Windowed attention as torch alone gives it: what tools/bench_attention.py compares with.

Shapes: B batch, H query heads, G key/value heads, S sequence, D head dim, b queries of a block, N blocks;
heads come first, as torch has them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from bench.attention_problem import Attend


def causal_sdpa(q_BHSD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor) -> Tensor:
    """Without a window, which is what a model pays that has none."""
    return F.scaled_dot_product_attention(q_BHSD, k_BGSD, v_BGSD, is_causal=True, enable_gqa=_gqa(q_BHSD, k_BGSD))


def band_sdpa(S: int, window: int) -> Attend:
    """With the window as a dense mask."""
    mask_SS = _band(S, S, window)
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask_SS, enable_gqa=_gqa(q, k))


def compiled_flex(S: int, window: int) -> Attend:
    """FlexAttention as torch.compile makes it, with its block mask; on CPU it has no backward."""

    def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & (j > i - window)

    mask = create_block_mask(seen, None, None, S, S, device="cpu")
    flex: Callable[..., Any] = torch.compile(flex_attention, dynamic=False)
    # On CPU it refuses tensors that could want a gradient.
    return lambda q, k, v: flex(q.detach(), k.detach(), v.detach(), block_mask=mask, enable_gqa=_gqa(q, k))


def block_forms(S: int, window: int, dtype: torch.dtype, blocks: Iterable[int]) -> dict[str, Attend]:
    """Blocks of b queries, each against the b + window keys it can see, all blocks and heads in one call.

    By name: attention by SDPA or by two batched products and a softmax; keys as overlapping views or as copies,
    of which backward likes one better and forward the other. Only blocks that divide window and S have the form.
    """
    return {
        f"{attention.__name__.strip('_')}-{keys.__name__.strip('_')}-{b}": partial(
            _in_blocks, window=window, b=b, bias_bK=_bias(b, b + window, window, dtype), attention=attention, keys=keys
        )
        for attention in (_sdpa, _bmm)
        for keys in (_views, _copies)
        for b in blocks
        if window % b == 0 and S % b == 0 and window < S
    }


def _in_blocks(
    q_BHSD: Tensor,
    k_BGSD: Tensor,
    v_BGSD: Tensor,
    *,
    window: int,
    b: int,
    bias_bK: Tensor,
    attention: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
    keys: Callable[[Tensor, int, int], Tensor],
) -> Tensor:
    B, H, _, D = q_BHSD.shape
    if k_BGSD.shape[1] != H:
        k_BGSD, v_BGSD = (x.repeat_interleave(H // x.shape[1], dim=1) for x in (k_BGSD, v_BGSD))
    # The first window of queries has no keys to its left: one causal call, so that all other blocks share a mask.
    head = causal_sdpa(*(x[:, :, :window] for x in (q_BHSD, k_BGSD, v_BGSD)))
    q_ANbD = q_BHSD.flatten(0, 1)[:, window:].unflatten(1, (-1, b))
    k_ANKD, v_ANKD = (keys(x.flatten(0, 1), window, b) for x in (k_BGSD, v_BGSD))
    rest = attention(q_ANbD, k_ANKD, v_ANKD, bias_bK)
    return torch.cat([head, rest.reshape(B, H, -1, D)], dim=2)


def _sdpa(q_ANbD: Tensor, k_ANKD: Tensor, v_ANKD: Tensor, bias_bK: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q_ANbD, k_ANKD, v_ANKD, attn_mask=bias_bK)


def _bmm(q_ANbD: Tensor, k_ANKD: Tensor, v_ANKD: Tensor, bias_bK: Tensor) -> Tensor:
    logits = (q_ANbD / math.sqrt(q_ANbD.shape[-1])) @ k_ANKD.transpose(-1, -2)
    return (logits + bias_bK).softmax(dim=-1) @ v_ANKD


def _views(x_ASD: Tensor, window: int, b: int) -> Tensor:
    """Keys of every block from the one that begins at `window`: [A, N, window + b, D]."""
    return x_ASD.unfold(1, window + b, b).transpose(2, 3)


def _copies(x_ASD: Tensor, window: int, b: int) -> Tensor:
    length = x_ASD.shape[1] - window
    shifted = (x_ASD[:, start : start + length].unflatten(1, (-1, b)) for start in range(0, window + b, b))
    return torch.cat(list(shifted), dim=2)


def _band(queries: int, keys: int, window: int) -> Tensor:
    """Which keys each query sees, the last query at the last key."""
    own = torch.arange(keys - queries, keys)[:, None]
    key = torch.arange(keys)
    return (key <= own) & (key > own - window)


def _bias(queries: int, keys: int, window: int, dtype: torch.dtype) -> Tensor:
    return torch.zeros(queries, keys, dtype=dtype).masked_fill(~_band(queries, keys, window), -math.inf)


def _gqa(q_BHSD: Tensor, k_BGSD: Tensor) -> bool:
    return q_BHSD.shape[1] != k_BGSD.shape[1]
