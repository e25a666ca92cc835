"""Windowed attention on the CPU in C++ (csrc/windowed_attention): vector registers, O(S * window) work.

Every processor runs it; AVX-512 with BF16, AVX-512 and AVX2 are chosen at run time, the best that is there.
float32 is computed in float32. bf16 is multiplied in bf16 and summed in float32 where there are instructions for it
(weights and their gradients are rounded to bf16 in between, as FlashAttention does), else in float32.

Results are the same bit for bit from run to run, whatever the number of threads.

The kernel takes plain pointers and borrows torch's own threads through its stable C interface, so one build serves
every version of torch. MEGAZEBRA_SIMD=off leaves it unused.

Shapes: B batch, S queries, T keys, H query heads, G key/value heads, D head dim.
"""

from __future__ import annotations

import ctypes
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from megazebra.attention.inputs import check_inputs
from megazebra.attention.packing import Packing
from megazebra.compiled import load_compiled
from megazebra.pattern import AttentionSpec

DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
MIN_HEAD_DIM, MAX_HEAD_DIM, HEAD_DIM_STEP = 32, 256, 16


def _load() -> ModuleType | str:
    module = load_compiled(
        "megazebra.attention._windowed_attention", "windowed_attention", switch="MEGAZEBRA_SIMD", off="off"
    )
    if isinstance(module, str):
        return module
    suffix = ".dylib" if sys.platform == "darwin" else ".so"
    library = Path(torch.__file__).parent / "lib" / f"libtorch_cpu{suffix}"
    try:
        parallel_for = ctypes.CDLL(str(library)).torch_parallel_for
    except (OSError, AttributeError) as error:
        return f"this torch ({torch.__version__}) lends no threads ({error})"
    module.set_parallel_for(ctypes.cast(parallel_for, ctypes.c_void_p).value)
    return module


_loaded = _load()


def unavailable(device: torch.device) -> str | None:
    if device.type != "cpu":
        return f"it runs on the CPU, the device is {device.type}"
    return f"it is not compiled ({_loaded})" if isinstance(_loaded, str) else None


def unsupported(spec: AttentionSpec, *, head_dim: int, dtype: torch.dtype, device: torch.device) -> str | None:
    if dtype not in DTYPES:
        return f"it computes in float32 or bfloat16, the dtype is {dtype}"
    if head_dim not in range(MIN_HEAD_DIM, MAX_HEAD_DIM + 1, HEAD_DIM_STEP):
        return f"its head_dim is a multiple of {HEAD_DIM_STEP} from {MIN_HEAD_DIM} to {MAX_HEAD_DIM}, got {head_dim}"
    return None


def instruction_sets() -> list[str]:
    """The instruction sets that this processor has, best first; the first one is used. [] when not compiled."""
    return [] if isinstance(_loaded, str) else _loaded.instruction_sets()


def attend(
    q_BSHD: Tensor,
    k_BTGD: Tensor,
    v_BTGD: Tensor,
    *,
    spec: AttentionSpec,
    packing: Packing | None = None,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """softmax(q k^T / sqrt(D)) v under the package's mask; float32 or bfloat16; returns [B, S, H, D].

    Differentiable once in q, k, v and the sinks. Opaque to torch.compile, which leaves it whole.
    Raises ValueError when the arguments don't fit together or the kernel can't compute them.
    """
    sizes = check_inputs(q_BSHD, k_BTGD, v_BTGD, spec, packing, sinks_H)
    device = q_BSHD.device
    why = unavailable(device) or unsupported(spec, head_dim=sizes.D, dtype=q_BSHD.dtype, device=device)
    if why is not None:
        raise ValueError(f"attention backend 'simd' can't compute this: {why}; use 'blocked'")
    document_start_BS = None if packing is None else packing.document_start_BS
    out_BSHD, _ = windowed_attention(q_BSHD, k_BTGD, v_BTGD, document_start_BS, sinks_H, spec.window, spec.softcap)
    return out_BSHD


@torch.library.custom_op("megazebra::windowed_attention", mutates_args=(), device_types="cpu")
def windowed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    document_start: Tensor | None,
    sinks: Tensor | None,
    window: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """The operator: out [B, S, H, D] in q's dtype and the log-sum-exp [B, S, H] in float32 (of no gradient).

    q [B, S, H, D]; k, v [B, T, G, D]; document_start int64 [B, S], first key of each query's document; sinks [H].
    Arguments are taken as `attend` checks them.
    """
    q, k, v = (_rows(x) for x in (q, k, v))
    out, lse = q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)
    document_start, sinks = _plain(document_start, torch.int64), _plain(sinks, torch.float32)
    _pass("forward", q, k, document_start, sinks, window, softcap)(*map(_tensor, (q, k, v, out)), lse.data_ptr())
    return out, lse


@windowed_attention.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    document_start: Tensor | None,
    sinks: Tensor | None,
    window: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("megazebra::windowed_attention_backward", mutates_args=(), device_types="cpu")
def windowed_attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    document_start: Tensor | None,
    sinks: Tensor | None,
    window: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v in their shape and dtype, and of the sinks in float32 ([0] when there are none)."""
    q, k, v, out, dout = (_rows(x) for x in (q, k, v, out, dout))
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    delta = torch.empty_like(lse)
    document_start, sinks = _plain(document_start, torch.int64), _plain(sinks, torch.float32)
    dsinks = lse.new_empty(0 if sinks is None else sinks.shape[0])
    _pass("backward", q, k, document_start, sinks, window, softcap)(
        *map(_tensor, (q, k, v, out, dout)),
        lse.data_ptr(),
        *map(_tensor, (dq, dk, dv)),
        delta.data_ptr(),
        0 if sinks is None else dsinks.data_ptr(),
    )
    return dq, dk, dv, dsinks


@windowed_attention_backward.register_fake
def _(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    document_start: Tensor | None,
    sinks: Tensor | None,
    window: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dsinks = lse.new_empty(0 if sinks is None else sinks.shape[0])
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dsinks


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, document_start, sinks, ctx.window, ctx.softcap = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)  # else backward would be given zeros for the log-sum-exp
    ctx.save_for_backward(q, k, v, out, lse, document_start, sinks)


def _backward(ctx: Any, dout: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, document_start, sinks = ctx.saved_tensors
    dq, dk, dv, dsinks = windowed_attention_backward(
        dout, q, k, v, out, lse, document_start, sinks, ctx.window, ctx.softcap
    )
    return dq, dk, dv, None, None if sinks is None else dsinks.to(sinks.dtype), None, None


# The backward operator has no derivative of its own: differentiating twice is an error of torch's that names it.
windowed_attention.register_autograd(_backward, setup_context=_setup_context)


def _pass(
    name: str,
    q: Tensor,
    k: Tensor,
    document_start: Tensor | None,
    sinks: Tensor | None,
    window: int | None,
    softcap: float | None,
) -> Any:
    """The compiled function with the arguments that both passes share."""
    assert not isinstance(_loaded, str)
    function = getattr(_loaded, f"{name}_{DTYPES[q.dtype]}")
    (B, S, H, D), (T, G) = q.shape, k.shape[1:3]

    def call(*arguments: Any) -> None:
        function(
            instruction_sets()[0],
            torch.get_num_threads(),
            (B, S, T, H, G, D),
            T if window is None else min(window, T),
            1 / math.sqrt(D),
            softcap or 0.0,
            0 if document_start is None else document_start.data_ptr(),
            0 if sinks is None else sinks.data_ptr(),
            *arguments,
        )

    return call


def _rows(x: Tensor) -> Tensor:
    """The kernel takes any strides but that of the head dimension."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _plain(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if x is None else x.to(dtype).contiguous()


def _tensor(x: Tensor) -> tuple[int, ...]:
    """Address and strides in elements."""
    return (x.data_ptr(), *x.stride()[:3])
