"""What a block does beside matrix products and attention, with gradients written by hand.

Composed of torch's differentiable operations, each of these keeps intermediate results for backward and sends
whole activations through memory several times. Here backward computes again what is cheap, and on a CPU the work
goes in chunks of rows whose temporaries stay in the caches.

Legend: N rows (tokens, or heads of tokens), E width of a norm, F width of the feed-forward layer; B batch,
S sequence, H heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# Of one tensor. On CPU, for each thread: several such should stay in the caches, and fewer elements would show the
# cost of calling operations. On a GPU a chunk only bounds the temporaries.
CHUNK_ELEMENTS = {"cpu": 2**18, "cuda": 2**26}


def chunks_of_rows(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Views of the same rows of every tensor; the first one's width says how many."""
    first = tensors[0]
    elements = CHUNK_ELEMENTS.get(first.device.type, CHUNK_ELEMENTS["cuda"])
    if first.device.type == "cpu":
        elements *= torch.get_num_threads()
    rows = max(1, elements // first[:1].numel())
    return zip(*(tensor.split(rows) for tensor in tensors), strict=True)


def rms_norm(x: Tensor, weight_E: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in x's dtype (Zhang and Sennrich 2019).

    Arithmetic is float32 (float64 for float64 inputs), rounded once. Backward keeps x and one number per row.
    Differentiable once.
    """
    if x.device.type == "cuda":  # elsewhere torch has no fused kernel
        return F.rms_norm(x, weight_E.shape, weight_E, eps)
    return _RMSNorm.apply(x.reshape(-1, x.shape[-1]), weight_E, eps).view(x.shape)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_NE: Tensor, weight_E: Tensor, eps: float) -> Tensor:
        compute = torch.promote_types(x_NE.dtype, torch.float32)
        out_NE = torch.empty_like(x_NE)
        scale_N1 = x_NE.new_empty(x_NE.shape[0], 1, dtype=compute)
        for x, out, scale in chunks_of_rows(x_NE, out_NE, scale_N1):
            torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=compute, out=scale)
            scale.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
            torch.mul(x * scale, weight_E, out=out)
        ctx.save_for_backward(x_NE, weight_E, scale_N1)
        return out_NE

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NE: Tensor) -> tuple[Tensor, Tensor, None]:
        x_NE, weight_E, scale_N1 = ctx.saved_tensors
        wide_weight_E = weight_E.to(scale_N1.dtype)
        grad_weight_E = torch.zeros_like(wide_weight_E)
        grad_x_NE = torch.empty_like(x_NE)
        for x, grad, scale, grad_x in chunks_of_rows(x_NE, grad_NE, scale_N1, grad_x_NE):
            x, grad = x.to(scale.dtype), grad.to(scale.dtype)
            product = x * grad
            grad_weight_E.addmv_(product.T, scale[:, 0])
            # The part of the gradient along x, which changes a row's length and so nothing of the output.
            along_x = (product @ wide_weight_E)[:, None] * scale.pow(3) / -x.shape[-1]
            torch.mul(grad, scale, out=product).mul_(wide_weight_E).addcmul_(x, along_x)
            grad_x.copy_(product)
        return grad_x_NE, grad_weight_E.to(weight_E.dtype), None


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer 2020). Backward keeps gate and up only. Differentiable once."""
    shape = gate.shape
    return _SwiGLU.apply(gate.reshape(-1, shape[-1]), up.reshape(-1, shape[-1])).view(shape)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_NF: Tensor, up_NF: Tensor) -> Tensor:
        out_NF = torch.empty_like(gate_NF)
        for gate, up, out in chunks_of_rows(gate_NF, up_NF, out_NF):
            torch.mul(F.silu(gate), up, out=out)
        ctx.save_for_backward(gate_NF, up_NF)
        return out_NF

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NF: Tensor) -> tuple[Tensor, Tensor]:
        gate_NF, up_NF = ctx.saved_tensors
        grad_gate_NF, grad_up_NF = torch.empty_like(gate_NF), torch.empty_like(up_NF)
        for gate, up, grad, grad_gate, grad_up in chunks_of_rows(gate_NF, up_NF, grad_NF, grad_gate_NF, grad_up_NF):
            torch.mul(F.silu(gate), grad, out=grad_up)
            torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=grad_gate)
        return grad_gate_NF, grad_up_NF


def rotate(x_BSHD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Dimensions i and i + D/2 of every head turned by their angle, in x's dtype.

    cos, sin: [B, S, 1, D/2] in float32 or wider, and so is the arithmetic; rounded once. Backward is the rotation
    back, so no activation is kept. Differentiable once in x.
    """
    return _Rotate.apply(x_BSHD, cos, sin)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BSHD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x_BSHD, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BSHD: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(grad_BSHD, cos, -sin), None, None


def _rotated(x_BSHD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    out_BSHD = torch.empty_like(x_BSHD, memory_format=torch.contiguous_format)
    compute = torch.promote_types(x_BSHD.dtype, cos.dtype)
    rows = (tensor.flatten(0, 1) for tensor in (x_BSHD, out_BSHD, cos, sin))
    for x, out, cos_of_x, sin_of_x in chunks_of_rows(*rows):
        x = x.to(compute)
        # Whole heads at once: operations on half heads would be loops over D/2 numbers.
        turned = x * torch.cat([cos_of_x, cos_of_x], dim=-1)
        swapped = x.roll(x.shape[-1] // 2, dims=-1)
        out.copy_(turned.addcmul_(swapped, torch.cat([-sin_of_x, sin_of_x], dim=-1)))
    return out_BSHD
