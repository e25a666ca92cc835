"""Attention in Triton whose cost follows the band, for GPUs and layers that FlashAttention doesn't serve.

The algorithm is FlashAttention-2's (Dao 2023); triton_kernels.py says how it follows the band. Forward keeps the
log-sum-exp of every query; backward is one kernel for dq, which loops over keys, and one for dk and dv, which
loops over queries, so that nothing is added atomically and results are the same bit for bit from run to run.
Products run in the inputs' dtype, those of float32 as three of TF32, and are accumulated in float32.

Never run on a GPU: the kernels are tested in Triton's interpreter, and compiled, by tests/attention.

Shapes: B batch, S queries, T keys, H query heads, G key/value heads, D head dim; N = S * H/G rows of a key/value head
(row = query * H/G + head: the query heads that share keys are rows of one matrix), R = H/G.
"""

from __future__ import annotations

import importlib
import math
import os
from typing import Any

import torch
from torch import Tensor

from megazebra.attention.inputs import check_inputs
from megazebra.attention.packing import Packing
from megazebra.attention.triton_blocks import Blocks, choose_blocks
from megazebra.pattern import AttentionSpec

LOG2_E = math.log2(math.e)
HEAD_DIMS = (32, 64, 80, 96, 128, 256)
DELTA_ROWS, LARGEST_BLOCK = 64, 128
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def unavailable(device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"the Triton kernels need a CUDA GPU, the device is {device.type}"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"the Triton kernels need compute capability 8.0 or newer, the GPU has {major}.{minor}"
    try:
        _kernels()
    except ModuleNotFoundError as error:
        return f"the package triton, which CUDA builds of torch bring along, is not installed ({error})"
    except Exception as error:
        return f"the package triton is installed but broken or too old ({type(error).__name__}: {error})"
    return None


def unsupported(spec: AttentionSpec, *, head_dim: int, dtype: torch.dtype, device: torch.device) -> str | None:
    if dtype not in DTYPES:
        return f"the Triton kernels compute in bf16, fp16 or fp32, the dtype is {dtype}"
    if head_dim not in HEAD_DIMS:
        return f"the Triton kernels have head_dim {', '.join(map(str, HEAD_DIMS))}, got {head_dim}"
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

    Differentiable once in q, k, v and the sinks. Raises ValueError when the arguments don't fit together, or for a
    dtype, head_dim or device without kernels.
    """
    D = check_inputs(q_BSHD, k_BTGD, v_BTGD, spec, packing, sinks_H).D
    if q_BSHD.device.type != "cuda" and not _interpreted():
        raise ValueError(f"attention backend 'triton' needs CUDA tensors, got {q_BSHD.device.type}; use 'blocked'")
    if why := unsupported(spec, head_dim=D, dtype=q_BSHD.dtype, device=q_BSHD.device):
        raise ValueError(f"attention backend 'triton' can't compute this: {why}")
    document_start_BS = None if packing is None else packing.document_start_BS
    return _forward(q_BSHD, k_BTGD, v_BTGD, sinks_H, document_start_BS, spec.window, spec.softcap)[0]


def _interpreted() -> bool:
    """Whether Triton runs kernels in Python on CPU tensors, as the tests have it do."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@torch.library.custom_op(
    "megazebra::triton_attention_forward",
    mutates_args=(),
    schema="(Tensor q_BSHD, Tensor k_BTGD, Tensor v_BTGD, Tensor? sinks_H, Tensor? document_start_BS, int? window, "
    "float? softcap) -> (Tensor out_BSHD, Tensor lse_BGN)",
)
def _forward(
    q_BSHD: Tensor,
    k_BTGD: Tensor,
    v_BTGD: Tensor,
    sinks_H: Tensor | None,
    document_start_BS: Tensor | None,
    window: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """The output and each query's log2-sum-exp2, float32."""
    kernels = _kernels()
    (B, S, H, D), (T, G) = q_BSHD.shape, k_BTGD.shape[1:3]
    q, k, v = _with_dense_rows(q_BSHD, k_BTGD, v_BTGD)
    out_BSHD, lse_BGN = _forward_outputs(q_BSHD, k_BTGD)
    blocks, options = _launch_options("forward", q, G, window, document_start_BS, softcap)
    with torch.cuda.device_of(q):
        kernels.forward_kernel[(_count(S * H // G, blocks.rows), B * G)](
            q, k, v, sinks_H, _dense(document_start_BS), out_BSHD, lse_BGN,
            *_strides(q, k, v), S, T, G, window or T, *_logit_scales(D, softcap),
            **options, SINKS=sinks_H is not None,
        )  # fmt: skip
    return out_BSHD, lse_BGN


@_forward.register_fake
def _forward_outputs(q_BSHD: Tensor, k_BTGD: Tensor, *unused: Any) -> tuple[Tensor, Tensor]:
    (B, S, H, _), G = q_BSHD.shape, k_BTGD.shape[2]
    return q_BSHD.new_empty(q_BSHD.shape), q_BSHD.new_empty(B, G, S * H // G, dtype=torch.float32)


@torch.library.custom_op(
    "megazebra::triton_attention_backward",
    mutates_args=(),
    schema="(Tensor dout_BSHD, Tensor q_BSHD, Tensor k_BTGD, Tensor v_BTGD, Tensor out_BSHD, Tensor lse_BGN, "
    "Tensor? document_start_BS, int? window, float? softcap) "
    "-> (Tensor dq_BSHD, Tensor dk_BTGD, Tensor dv_BTGD, Tensor delta_BGN)",
)
def _backward(
    dout_BSHD: Tensor,
    q_BSHD: Tensor,
    k_BTGD: Tensor,
    v_BTGD: Tensor,
    out_BSHD: Tensor,
    lse_BGN: Tensor,
    document_start_BS: Tensor | None,
    window: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q, k and v, and sum(dout * out) of every query."""
    kernels = _kernels()
    (B, S, H, D), (T, G) = q_BSHD.shape, k_BTGD.shape[1:3]
    dout, q, k, v = _with_dense_rows(dout_BSHD, q_BSHD, k_BTGD, v_BTGD)
    document_start_BS = _dense(document_start_BS)
    dq_BSHD, dk_BTGD, dv_BTGD, delta_BGN = _backward_outputs(dout_BSHD, q_BSHD, k_BTGD)
    scales = (D**-0.5, *_logit_scales(D, softcap))
    with torch.cuda.device_of(q):
        kernels.delta_kernel[(_count(S * H // G, DELTA_ROWS), B * G)](
            out_BSHD, dout, delta_BGN, *_strides(dout), S, G,
            R=H // G, HEAD_DIM=D, M=DELTA_ROWS, D=_padded(D), enable_fp_fusion=True,
        )  # fmt: skip
        blocks, options = _launch_options("query_gradient", q, G, window, document_start_BS, softcap)
        kernels.query_gradient_kernel[(_count(S * H // G, blocks.rows), B * G)](
            q, k, v, document_start_BS, dout, lse_BGN, delta_BGN, dq_BSHD,
            *_strides(q, k, v, dout), S, T, G, window or T, *scales, **options,
        )  # fmt: skip
        blocks, options = _launch_options("key_gradient", q, G, window, document_start_BS, softcap)
        kernels.key_gradient_kernel[(_count(T, blocks.keys), B * G)](
            q, k, v, document_start_BS, _query_ends(document_start_BS, T, blocks.keys), dout, lse_BGN, delta_BGN,
            dk_BTGD, dv_BTGD, *_strides(q, k, v, dout), S, T, G, window or T, *scales, **options,
        )  # fmt: skip
    return dq_BSHD, dk_BTGD, dv_BTGD, delta_BGN


@_backward.register_fake
def _backward_outputs(dout_BSHD: Tensor, q_BSHD: Tensor, k_BTGD: Tensor, *unused: Any) -> tuple[Tensor, ...]:
    (B, S, H, _), G = q_BSHD.shape, k_BTGD.shape[2]
    dk_BTGD, dv_BTGD = (k_BTGD.new_empty(k_BTGD.shape) for _ in range(2))
    return q_BSHD.new_empty(q_BSHD.shape), dk_BTGD, dv_BTGD, q_BSHD.new_empty(B, G, S * H // G, dtype=torch.float32)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, window, softcap = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.window, ctx.softcap = window, softcap


def _gradients(ctx: Any, dout_BSHD: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    q_BSHD, k_BTGD, v_BTGD, sinks_H, document_start_BS, out_BSHD, lse_BGN = ctx.saved_tensors
    dq, dk, dv, delta_BGN = _backward(
        dout_BSHD, q_BSHD, k_BTGD, v_BTGD, out_BSHD, lse_BGN, document_start_BS, ctx.window, ctx.softcap
    )
    dsinks = None
    if sinks_H is not None:
        lse_BGSR, delta_BGSR = (x.unflatten(2, (q_BSHD.shape[1], -1)) for x in (lse_BGN, delta_BGN))
        weight_BGSR = torch.exp2(sinks_H.float().view(lse_BGSR.shape[1], 1, -1) * LOG2_E - lse_BGSR)
        dsinks = -(weight_BGSR * delta_BGSR).sum((0, 2)).flatten().to(sinks_H.dtype)
    return dq, dk, dv, dsinks, None, None, None


_forward.register_autograd(_gradients, setup_context=_save_for_backward)


def _kernels() -> Any:
    """Imported late, because it imports triton, which may not be there."""
    return importlib.import_module("megazebra.attention.triton_kernels")


def _launch_options(
    kernel: str, q: Tensor, groups: int, window: int | None, document_start_BS: Tensor | None, softcap: float | None
) -> tuple[Blocks, dict[str, Any]]:
    """Block sizes, and what Triton compiles a kernel for."""
    D = q.shape[-1]
    blocks = choose_blocks(kernel, _capability(q.device), _padded(D), q.element_size())
    return blocks, {
        "R": q.shape[2] // groups, "HEAD_DIM": D, "M": blocks.rows, "N": blocks.keys, "D": _padded(D),
        "DOT": _kernels().dot_dtype(q.dtype), "WINDOWED": window is not None,
        "DOCUMENTS": document_start_BS is not None, "CAPPED": softcap is not None,
        "num_warps": blocks.warps, "num_stages": blocks.stages,
        "enable_fp_fusion": True,  # asked for, because Triton's default is about to change
    }  # fmt: skip


def _capability(device: torch.device) -> tuple[int, int] | None:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def _logit_scales(head_dim: int, softcap: float | None) -> tuple[float, float]:
    """Factors of q·k and of tanh that give a logit in units of log 2."""
    scale = head_dim**-0.5
    return (scale * LOG2_E, 1.0) if softcap is None else (scale / softcap, softcap * LOG2_E)


def _query_ends(document_start_BS: Tensor | None, T: int, block: int) -> Tensor | None:
    """Queries of documents that start up to each key block's first key, and up to its last one: [B, 2 * blocks].

    They bound the queries that see the whole block or any of it, counted on the device so that the host needn't wait.
    """
    if document_start_BS is None:
        return None
    first = torch.arange(0, T, block, device=document_start_BS.device)
    edges = torch.stack([first, (first + block - 1).clamp(max=T - 1)], dim=-1).flatten()
    edges = edges.expand(document_start_BS.shape[0], -1).contiguous()
    return torch.searchsorted(document_start_BS, edges, right=True, out_int32=True)


def _strides(*tensors: Tensor) -> list[int]:
    """Of a row, a head and an element of the batch, for each [batch, sequence, heads, head_dim]."""
    return [tensor.stride(dim) for tensor in tensors for dim in (1, 2, 0)]


def _with_dense_rows(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors, copied where a row isn't dense or a block's offsets wouldn't fit into 32 bits."""
    return tuple(tensor if _has_dense_rows(tensor) else tensor.contiguous() for tensor in tensors)


def _has_dense_rows(tensor: Tensor) -> bool:
    _, row, head, element = tensor.stride()
    return element == 1 and LARGEST_BLOCK * row + tensor.shape[2] * head < 2**31


def _dense(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _padded(head_dim: int) -> int:
    return 1 << (head_dim - 1).bit_length()


def _count(length: int, block: int) -> int:
    return -(-length // block)
