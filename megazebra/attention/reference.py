"""The oracle: dense attention written to be read, differentiated by autograd. Quadratic in memory.

Shapes: B batch, S queries, T keys, H query heads, G key/value heads, R = H/G, D head dim.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megazebra.attention.inputs import check_inputs
from megazebra.attention.packing import Packing
from megazebra.pattern import AttentionSpec


def unavailable(device: torch.device) -> str | None:
    return None


def unsupported(spec: AttentionSpec, *, head_dim: int, dtype: torch.dtype, device: torch.device) -> str | None:
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
    """softmax(q k^T / sqrt(D)) v under the package's mask (Vaswani et al. 2017, eq. 1); returns [B, S, H, D].

    Computed in float32, or float64 for float64 inputs, and rounded to q's dtype at the end.
    Raises ValueError when shapes, dtypes or options don't fit together.
    """
    B, S, T, H, G, D = check_inputs(q_BSHD, k_BTGD, v_BTGD, spec, packing, sinks_H)
    dtype = torch.promote_types(q_BSHD.dtype, torch.float32)
    k_BTHD = k_BTGD.to(dtype).repeat_interleave(H // G, dim=2)
    v_BTHD = v_BTGD.to(dtype).repeat_interleave(H // G, dim=2)

    logits_BHST = torch.einsum("bshd,bthd->bhst", q_BSHD.to(dtype), k_BTHD) / math.sqrt(D)
    if spec.softcap is not None:
        logits_BHST = spec.softcap * torch.tanh(logits_BHST / spec.softcap)
    seen_BST = visible(S, T, spec.window, packing, q_BSHD.device)
    logits_BHST = logits_BHST.masked_fill(~seen_BST[:, None], -math.inf)
    if sinks_H is not None:
        # A sink is a key of its own for each head that takes weight and gives no value (gpt-oss).
        sink_BHS1 = sinks_H.to(dtype).view(1, H, 1, 1).expand(B, H, S, 1)
        weights_BHST = torch.cat([logits_BHST, sink_BHS1], dim=-1).softmax(dim=-1)[..., :T]
    else:
        weights_BHST = logits_BHST.softmax(dim=-1)
    return torch.einsum("bhst,bthd->bshd", weights_BHST, v_BTHD).to(q_BSHD.dtype)


def visible(S: int, T: int, window: int | None, packing: Packing | None, device: torch.device) -> Tensor:
    """Which keys each query sees: bool [B, S, T], with B = 1 when there is no packing."""
    own_key_S1 = torch.arange(T - S, T, device=device)[:, None]
    key_T = torch.arange(T, device=device)
    seen_ST = key_T <= own_key_S1
    if window is not None:
        seen_ST = seen_ST & (key_T > own_key_S1 - window)
    if packing is None:
        return seen_ST[None]
    return seen_ST & (key_T >= packing.document_start_BS[:, :, None])
