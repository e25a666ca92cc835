"""FlashAttention 4, 3 or 2 (Dao et al.), whichever is installed and fits the GPU.

Written from the libraries' interfaces and tested against stand-ins that follow their documented semantics;
never run on a GPU.

The libraries differ in little: all take [B, S, H, D], align queries and keys at the end when causal, and call
a window of w keys (w - 1, 0). "No limit on the left" is -1 in 2 and 3, None in 4.

Shapes: B batch, S queries, T keys, H query heads, G key/value heads, D head dim.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megazebra.attention.inputs import check_inputs
from megazebra.attention.packing import Packing
from megazebra.pattern import AttentionSpec


@dataclass(frozen=True)
class Library:
    """One generation of FlashAttention: where it is and what it can do."""

    name: str
    module: str
    majors: tuple[int, ...]  # CUDA compute capabilities it has kernels for, forward and backward
    no_window: int | None


LIBRARIES = (
    Library("FlashAttention-4", "flash_attn.cute", (9, 10, 11), None),
    Library("FlashAttention-3", "flash_attn_interface", (9,), -1),
    Library("FlashAttention-2", "flash_attn", (8, 9, 10, 12), -1),
)
# Some versions take an option in forward and leave it out in backward without a word, and FlashAttention-4 computed
# another function than a softcap until it had the gradient. What shows that a version has it: module, function, and
# the function's parameter.
GRADIENT_SHOWN_BY: dict[tuple[str, str], tuple[str, str, str | None]] = {
    ("flash_attn.cute", "learnable_sink"): ("flash_attn.cute.interface", "_flash_attn_bwd", "learnable_sink"),
    ("flash_attn.cute", "softcap"): ("flash_attn.cute.utils", "create_softcap_scoremod_bwd", None),
    ("flash_attn", "softcap"): ("flash_attn.flash_attn_interface", "_flash_attn_backward", "softcap"),
}
NEEDED_ARGUMENTS = ("softmax_scale", "causal", "window_size")


@dataclass(frozen=True)
class Kernels:
    dense: Callable[..., Any]
    varlen: Callable[..., Any]
    arguments: frozenset[str]  # optional features both of them have
    differentiable: frozenset[str]  # those of them that backward takes into account


def unavailable(device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"FlashAttention needs a CUDA GPU, the device is {device.type}"
    _, reasons = _usable(_compute_capability(device))
    return reasons


def unsupported(spec: AttentionSpec, *, head_dim: int, dtype: torch.dtype, device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"FlashAttention needs a CUDA GPU, the device is {device.type}"
    choice = _choose(spec, head_dim, dtype, _compute_capability(device))
    return choice if isinstance(choice, str) else None


def attend(
    q_BSHD: Tensor,
    k_BTGD: Tensor,
    v_BTGD: Tensor,
    *,
    spec: AttentionSpec,
    packing: Packing | None = None,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """softmax(q k^T / sqrt(D)) v under the package's mask; bf16 or fp16; returns [B, S, H, D].

    Raises ValueError when the arguments don't fit together or no installed library can compute them.
    """
    B, S, T, H, G, D = check_inputs(q_BSHD, k_BTGD, v_BTGD, spec, packing, sinks_H)
    choice = _choose(spec, D, q_BSHD.dtype, _compute_capability(q_BSHD.device))
    if isinstance(choice, str):
        raise ValueError(f"attention backend 'flash' can't compute this: {choice}")
    library, kernels = choice

    # The window counts the query itself; the libraries' left excludes it.
    left = library.no_window if spec.window is None else spec.window - 1
    options: dict[str, Any] = {
        "softmax_scale": D**-0.5,
        "causal": True,
        "window_size": (left, library.no_window if spec.window is None else 0),
    }
    if spec.softcap is not None:
        options["softcap"] = spec.softcap
    if sinks_H is not None:
        options["learnable_sink"] = sinks_H
    if packing is None:
        return _first(kernels.dense(q_BSHD, k_BTGD, v_BTGD, **options))
    out = kernels.varlen(
        q_BSHD.reshape(B * S, H, D),
        k_BTGD.reshape(B * T, G, D),
        v_BTGD.reshape(B * T, G, D),
        cu_seqlens_q=packing.cu_seqlens_q,
        cu_seqlens_k=packing.cu_seqlens_k,
        max_seqlen_q=packing.max_seqlen_q,
        max_seqlen_k=packing.max_seqlen_k,
        **options,
    )
    return _first(out).view(B, S, H, D)


def _first(result: Any) -> Tensor:
    """FlashAttention-4 and early 3 return (out, lse), the others out alone."""
    return result[0] if isinstance(result, tuple) else result


def _compute_capability(device: torch.device) -> int:
    """Major version, 8 for Ampere, 9 for Hopper, 10 for Blackwell."""
    if device.type != "cuda":
        raise ValueError(f"attention backend 'flash' needs CUDA tensors, got {device.type}; use 'blocked'")
    return torch.cuda.get_device_capability(device)[0]


def _usable(major: int) -> tuple[list[tuple[Library, Kernels]], str | None]:
    """Libraries that are installed and have kernels for this GPU; if none, why each of them isn't there."""
    usable, reasons = [], []
    for library in LIBRARIES:
        kernels = _load(library)
        if isinstance(kernels, str):
            reasons.append(kernels)
        elif major not in library.majors:
            reasons.append(f"{library.name} has no kernels for compute capability {major}.x")
        else:
            usable.append((library, kernels))
    return usable, None if usable else "; ".join(reasons)


def _choose(spec: AttentionSpec, head_dim: int, dtype: torch.dtype, major: int) -> tuple[Library, Kernels] | str:
    """The first library that can compute such layers, or why none can."""
    usable, reason = _usable(major)
    if reason is not None:
        return reason
    if dtype not in (torch.bfloat16, torch.float16):
        return f"FlashAttention computes in bf16 or fp16, the dtype is {dtype}"
    if head_dim > 256 or head_dim % 8 != 0:
        return f"FlashAttention's head_dim is a multiple of 8 up to 256, got {head_dim}"
    refusals = []
    for library, kernels in usable:
        refusal = _refusal(library, kernels, spec, head_dim, major)
        if refusal is None:
            return library, kernels
        refusals.append(refusal)
    return "; ".join(refusals)


def _refusal(library: Library, kernels: Kernels, spec: AttentionSpec, head_dim: int, major: int) -> str | None:
    if spec.sinks and "learnable_sink" not in kernels.arguments:
        return f"{library.name} has no attention sinks"
    if spec.sinks and "learnable_sink" not in kernels.differentiable:
        return f"this {library.name} has no gradient for attention sinks"
    if spec.softcap is not None and "softcap" not in kernels.arguments:
        return f"this {library.name} is too old for a softcap"
    if spec.softcap is not None and "softcap" not in kernels.differentiable:
        return f"this {library.name} has no gradient for a softcap"
    if library.module == "flash_attn.cute" and major >= 10 and head_dim > 128:
        if head_dim != 256:
            return f"{library.name} on Blackwell has head_dim up to 128, or 256, got {head_dim}"
        if spec.sinks or spec.softcap is not None:
            return f"{library.name} on Blackwell has neither sinks nor softcap at head_dim 256"
    return None


@functools.cache
def _load(library: Library) -> Kernels | str:
    """The library's two functions, or why they can't be had. Whatever a broken install raises is a reason."""
    try:
        module = importlib.import_module(library.module)
        dense, varlen = module.flash_attn_func, module.flash_attn_varlen_func
        parameters = [inspect.signature(function).parameters for function in (dense, varlen)]
    except ModuleNotFoundError as error:
        return f"{library.name} is not installed ({error})"
    except Exception as error:
        return f"{library.name} is installed but broken ({type(error).__name__}: {error})"
    arguments = frozenset(parameters[0]) & frozenset(parameters[1])
    missing = [name for name in NEEDED_ARGUMENTS if name not in arguments]
    if missing:
        return f"{library.name} is too old (no argument {', '.join(missing)})"
    return Kernels(dense, varlen, arguments, frozenset(name for name in arguments if _has_gradient(library, name)))


def _has_gradient(library: Library, argument: str) -> bool:
    """Whether backward takes an argument into account that forward has."""
    if (library.module, argument) not in GRADIENT_SHOWN_BY:
        return True
    module, function, parameter = GRADIENT_SHOWN_BY[library.module, argument]
    try:
        parameters = inspect.signature(getattr(importlib.import_module(module), function)).parameters
    except (ImportError, AttributeError):
        return False
    # A later FlashAttention-2 hides its signature in a registered operator.
    hidden = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    return parameter is None or hidden or parameter in parameters
