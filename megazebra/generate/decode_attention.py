"""Attention of one new token over what a cache keeps: nothing of the cache is copied, nothing is repeated.

Legend: B batch, H query heads, G key/value heads, R = H/G, N = B G, T keys, D head dim.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megazebra.pattern import AttentionSpec

# Of one block of keys in float32, where the cache has another dtype. On CPU it should stay in the caches.
_BLOCK_ELEMENTS = {"cpu": 2**20, "cuda": 2**26}


def attend_to_cache(
    q_B1HD: Tensor,
    k_BGTD: Tensor,
    v_BGTD: Tensor,
    *,
    spec: AttentionSpec,
    sinks_H: Tensor | None = None,
    unseen_BT: Tensor | None = None,
) -> Tensor:
    """softmax(q k^T / sqrt(D)) v over all T keys in whatever order they lie; [B, 1, H, D] in q's dtype.

    Arithmetic is float32 (float64 for float64 inputs). unseen_BT: bool, keys that a row does not see. The window is the
    caller's: all keys are within it. On GPUs, too, this is plain torch; never run there.
    """
    B, _, H, D = q_B1HD.shape
    G, T = k_BGTD.shape[1:3]
    compute = torch.promote_types(q_B1HD.dtype, torch.float32)
    q_NRD = q_B1HD.reshape(B * G, H // G, D).to(compute) / math.sqrt(D)
    # Views: a cache that could not be viewed so would be copied for every token.
    k_NTD, v_NTD = k_BGTD.view(B * G, T, D), v_BGTD.view(B * G, T, D)
    block = max(1, _BLOCK_ELEMENTS.get(k_BGTD.device.type, _BLOCK_ELEMENTS["cuda"]) // (B * G * D))

    logits = [torch.bmm(q_NRD, keys.to(compute).transpose(1, 2)) for keys in k_NTD.split(block, dim=1)]
    logits_BHT = torch.cat(logits, dim=-1).view(B, H, T)
    if spec.softcap is not None:
        logits_BHT = spec.softcap * torch.tanh(logits_BHT / spec.softcap)
    if unseen_BT is not None:
        logits_BHT.masked_fill_(unseen_BT[:, None], -math.inf)
    weights_NRT = logits_BHT.softmax(dim=-1).view(B * G, H // G, T)

    out_NRD = torch.zeros_like(q_NRD)
    for weights, values in zip(weights_NRT.split(block, dim=-1), v_NTD.split(block, dim=1), strict=True):
        out_NRD.baddbmm_(weights, values.to(compute))
    out_B1HD = out_NRD.view(B, 1, H, D)
    if sinks_H is not None:
        # exp(lse) / (exp(lse) + exp(sink)): the share of the weight that the sink leaves to the keys.
        out_B1HD *= torch.sigmoid(logits_BHT.logsumexp(dim=-1) - sinks_H)[:, None, :, None]
    return out_B1HD.to(q_B1HD.dtype)
