"""What every backend accepts: one check of shapes, dtypes and options, used by all of them.

Shapes: B batch, S queries, T keys, H query heads, G key/value heads, D head dim.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from megazebra.attention.packing import Packing
from megazebra.pattern import AttentionSpec


class Sizes(NamedTuple):
    B: int
    S: int
    T: int
    H: int
    G: int
    D: int

    @property
    def R(self) -> int:  # noqa: N802
        """Query heads that share a key/value head."""
        return self.H // self.G

    @property
    def offset(self) -> int:
        """Index among the keys of query 0's own key."""
        return self.T - self.S


def check_inputs(
    q_BSHD: Tensor, k_BTGD: Tensor, v_BTGD: Tensor, spec: AttentionSpec, packing: Packing | None, sinks_H: Tensor | None
) -> Sizes:
    """The sizes of one call of `attend`. Raises ValueError, naming argument and values, when they don't fit."""
    for name, tensor in (("q", q_BSHD), ("k", k_BTGD), ("v", v_BTGD)):
        if tensor.ndim != 4 or 0 in tensor.shape:
            raise ValueError(f"{name} must be [batch, sequence, heads, head_dim], none of them 0, got {_shape(tensor)}")
        if tensor.dtype != q_BSHD.dtype or not tensor.is_floating_point():
            raise ValueError(
                f"q, k, v must share a floating dtype, got {q_BSHD.dtype} for q, {tensor.dtype} for {name}"
            )
        if tensor.device != q_BSHD.device:
            raise ValueError(f"q, k, v must be on one device, got {q_BSHD.device} for q, {tensor.device} for {name}")
    B, S, H, D = q_BSHD.shape
    T, G = k_BTGD.shape[1:3]
    if k_BTGD.shape != v_BTGD.shape:
        raise ValueError(f"k and v must have one shape, got k {_shape(k_BTGD)} and v {_shape(v_BTGD)}")
    if (k_BTGD.shape[0], k_BTGD.shape[3]) != (B, D):
        raise ValueError(f"q and k must share batch and head_dim, got q {_shape(q_BSHD)} and k {_shape(k_BTGD)}")
    if H % G != 0:
        raise ValueError(f"query heads must be a multiple of key/value heads, got {H} and {G}")
    if S > T:
        raise ValueError(f"queries may not outnumber keys (the last query sees the last key), got S={S} > T={T}")
    if spec.window is not None and spec.window < 1:
        raise ValueError(f"window counts the query itself, so it is >= 1, got {spec.window}")
    if spec.sinks != (sinks_H is not None):
        raise ValueError(f"sinks are given exactly when the layer has them, got spec.sinks={spec.sinks} and "
                         f"sinks {'None' if sinks_H is None else _shape(sinks_H)}")  # fmt: skip
    if sinks_H is not None and (tuple(sinks_H.shape) != (H,) or sinks_H.device != q_BSHD.device):
        raise ValueError(f"sinks must be [{H}] (query heads) on {q_BSHD.device}, "
                         f"got {_shape(sinks_H)} on {sinks_H.device}")  # fmt: skip
    if packing is not None:
        packed = (*packing.document_start_BS.shape, packing.keys_per_row)
        if packed != (B, S, T):
            raise ValueError(f"packing describes (rows, queries, keys) {packed}, but q and k have {(B, S, T)}")
        if packing.document_start_BS.device != q_BSHD.device:
            raise ValueError(f"packing is on {packing.document_start_BS.device}, q on {q_BSHD.device}; "
                             "move it once per batch with packing.to(device)")  # fmt: skip
    return Sizes(B, S, T, H, G, D)


def _shape(tensor: Tensor) -> str:
    return str(list(tensor.shape))
