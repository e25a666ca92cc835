"""The functions of `elementwise`, each fused by torch.compile: one kernel forward and one backward.

Only functions of tensors are compiled: ZeRO's and recomputation's hooks, collectives and attention stay outside.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def check_compiler(device: torch.device) -> None:
    """Raises ValueError where torch.compile cannot produce kernels for the device."""
    try:
        torch.compile(F.silu)(torch.zeros(8, device=device))
    except Exception as error:
        needed = "a C++ compiler" if device.type == "cpu" else "Triton"
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(
            f"train.compile=true, but torch.compile fails on this {device.type}: {lines[0]}; "
            f"install {needed}, or set train.compile=false"
        ) from error


@torch.compile
def rms_norm(x: Tensor, weight_E: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, weight_E.shape, weight_E, eps)


@torch.compile
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


@torch.compile
def rotate(x_BSHD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x_BSHD.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x_BSHD.dtype)
