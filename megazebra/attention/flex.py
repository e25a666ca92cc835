"""Torch's FlexAttention (He et al. 2024), compiled on CUDA: every option of the package without another library.

FlexAttention has no backward on CPU; there `attend` runs uncompiled, forward only, which is how the mask and the
score functions are tested. The compiled path has never run on a GPU.

Shapes: B batch, S queries, T keys, H query heads, G key/value heads, D head dim.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, create_block_mask, flex_attention

from megazebra.attention.inputs import check_inputs
from megazebra.attention.packing import Packing
from megazebra.pattern import AttentionSpec

MaskKey = tuple[int | None, int, int, torch.device]


def unavailable(device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"FlexAttention has a backward pass on CUDA only, the device is {device.type}"
    return None


def unsupported(spec: AttentionSpec, *, head_dim: int, dtype: torch.dtype, device: torch.device) -> str | None:
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"FlexAttention computes in bf16, fp16 or fp32, the dtype is {dtype}"
    if head_dim < 16:
        return f"FlexAttention's head_dim is at least 16, got {head_dim}"
    return None


def attend(
    q_BSHD: Tensor,
    k_BTGD: Tensor,
    v_BTGD: Tensor,
    *,
    spec: AttentionSpec,
    packing: Packing | None = None,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """softmax(q k^T / sqrt(D)) v under the package's mask; returns [B, S, H, D] in q's dtype.

    Raises ValueError when the arguments don't fit together, or on CPU when a gradient is wanted.
    """
    _, S, T, H, G, D = check_inputs(q_BSHD, k_BTGD, v_BTGD, spec, packing, sinks_H)
    on_cuda = q_BSHD.device.type == "cuda"
    wants_gradient = any(x is not None and x.requires_grad for x in (q_BSHD, k_BTGD, v_BTGD, sinks_H))
    if not on_cuda and torch.is_grad_enabled() and wants_gradient:
        raise ValueError(f"attention backend 'flex' has no backward on {q_BSHD.device.type}; use 'blocked'")
    if why := unsupported(spec, head_dim=D, dtype=q_BSHD.dtype, device=q_BSHD.device):
        raise ValueError(f"attention backend 'flex' can't compute this: {why}")

    flex = _compiled_flex() if on_cuda else _eager_flex
    out_BHSD, aux = flex(
        q_BSHD.transpose(1, 2),
        k_BTGD.transpose(1, 2),
        v_BTGD.transpose(1, 2),
        score_mod=_softcap(spec.softcap),
        block_mask=_block_mask(packing, (spec.window, S, T, q_BSHD.device)),
        scale=1 / math.sqrt(D),
        enable_gqa=H != G,
        return_aux=AuxRequest(lse=True),
    )
    if sinks_H is not None:
        # exp(lse) / (exp(lse) + exp(sink)): the share of the weight that the sink leaves to the keys.
        kept_BHS = torch.sigmoid(aux.lse - sinks_H.view(1, H, 1))
        out_BHSD = (out_BHSD * kept_BHS[..., None]).to(q_BSHD.dtype)
    return out_BHSD.transpose(1, 2)


def _eager_flex(q_BHSD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor, **options: Any) -> Any:
    with warnings.catch_warnings():
        # Torch warns that this path is dense; on CPU that is what it is used for.
        warnings.filterwarnings("ignore", message=".*flex_attention.*without torch.compile.*")
        # On CPU it refuses tensors that could want a gradient, even where none is recorded.
        return flex_attention(q_BHSD.detach(), k_BGTD.detach(), v_BGTD.detach(), **options)


@functools.cache
def _compiled_flex() -> Callable[..., Any]:
    return torch.compile(flex_attention, dynamic=False)


@functools.cache
def _softcap(softcap: float | None) -> Callable[..., Tensor] | None:
    """One function object per value, so that compiled code is found again."""
    if softcap is None:
        return None

    def score_mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return score_mod


_masks_of_packing: WeakKeyDictionary[Packing, dict[MaskKey, BlockMask]] = WeakKeyDictionary()


def _block_mask(packing: Packing | None, key: MaskKey) -> BlockMask:
    """Built once per batch and kind of layer: kept for as long as the packing it belongs to."""
    if packing is None:
        return _unpacked_mask(key)
    masks = _masks_of_packing.setdefault(packing, {})
    if key not in masks:
        masks[key] = _build_mask(key, packing.document_start_BS)
    return masks[key]


@functools.lru_cache(maxsize=32)
def _unpacked_mask(key: MaskKey) -> BlockMask:
    return _build_mask(key, None)


def _build_mask(key: MaskKey, document_start_BS: Tensor | None) -> BlockMask:
    window, S, T, device = key
    offset = T - S

    def mask_mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        seen = j <= i + offset
        if window is not None:
            seen = seen & (j > i + offset - window)
        if document_start_BS is not None:
            seen = seen & (j >= document_start_BS[b, i])
        return seen

    B = None if document_start_BS is None else document_start_BS.shape[0]
    # Uncompiled, create_block_mask writes out the whole S x T mask.
    return create_block_mask(mask_mod, B, None, S, T, device=device, _compile=device.type == "cuda")
