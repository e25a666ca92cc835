"""One layer's attention on a context-parallel rank: its tensors, its passes, and a kernel that computes nothing.

Shapes: B = 1 batch, n tokens of this rank, H query heads, G key/value heads, D head dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megazebra.attention.backend import BackendChoice
from megazebra.context.strategy import load_strategy
from megazebra.context.traffic import Shape
from megazebra.parallel.mesh import Group
from megazebra.pattern import AttentionSpec


def tensors(shape: Shape, dtype: torch.dtype, seed: int) -> list[Tensor]:
    """q, k, v that want gradients and the gradient of the output: a rank's [1, n, H or G, D]."""
    random = torch.Generator().manual_seed(seed)
    heads = (shape.heads, shape.kv_heads, shape.kv_heads, shape.heads)
    q, k, v, dout = (
        torch.randn((1, shape.local_len, count, shape.head_dim), generator=random, dtype=dtype) for count in heads
    )
    return [q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), dout]


def forward(leaves: list[Tensor], spec: AttentionSpec, backend: BackendChoice, group: Group) -> Tensor:
    """Output [1, n, H, D] under the strategy that the spec names; one document."""
    attend = load_strategy(spec.context, group)
    return attend(*leaves, spec=spec, packing=None, backend=backend, group=group)


class _Nothing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_BSHD: Tensor, k_BTGD: Tensor, v_BTGD: Tensor) -> Tensor:
        ctx.save_for_backward(q_BSHD, k_BTGD, v_BTGD)
        return torch.empty_like(q_BSHD)

    @staticmethod
    def backward(ctx: Any, dout_BSHD: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(saved) for saved in ctx.saved_tensors)


# Under it a strategy exchanges and copies what it always does. Outputs and gradients have their sizes and any values.
NO_KERNEL = BackendChoice("nothing", lambda q, k, v, **_: _Nothing.apply(q, k, v), "computes nothing")
