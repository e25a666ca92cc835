"""Column-parallel input under sequence parallelism: keep the shard, gather it again in backward.

A weight's gradient needs the layer's whole input. Kept from forward it costs [B, S, E] per pair of norms
and layers on every rank, whatever the tensor-parallel size; kept as a shard it costs 1/tp of that and one more
all-gather in backward (Korthikanti et al. 2022, section 4.2.2).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from megazebra.parallel.collectives import all_gather, enter_tensor_parallel
from megazebra.parallel.mesh import Group


class Regather:
    """The shard [B, S/tp, E] of an input that several layers share, and the whole of it while backward needs it."""

    def __init__(self, shard_BSE: Tensor, tp: Group, label: str) -> None:
        self.shard_BSE = shard_BSE.detach()
        self.tp = tp
        self.label = label
        self.readers = 0
        self._whole_BSE: Tensor | None = None

    def read(self) -> Tensor:
        """The whole input [B, S, E], gathered for the first of its layers and let go after the last."""
        whole_BSE = self._whole_BSE
        if whole_BSE is None:
            whole_BSE = all_gather(self.shard_BSE, self.tp, dim=1, label=self.label)
        self.readers -= 1
        self._whole_BSE = whole_BSE if self.readers > 0 else None
        return whole_BSE


def column_input(
    x_BSE: Tensor, tp: Group, *, sequence_parallel: bool, keep_gathered: bool, label: str
) -> tuple[Tensor, Regather | None]:
    """What column-parallel layers take: their whole input, and how to get it again.

    keep_gathered: keep the whole input for backward after all, as a block that is recomputed anyway should.
    """
    whole_BSE = enter_tensor_parallel(x_BSE, tp, sequence_parallel=sequence_parallel, label=label)
    if tp.size == 1 or not sequence_parallel or keep_gathered or not torch.is_grad_enabled():
        return whole_BSE, None
    return whole_BSE, Regather(x_BSE, tp, label)


class LinearWithRegather(torch.autograd.Function):
    """F.linear whose backward reads its input from a Regather in place of a saved tensor."""

    @staticmethod
    def forward(ctx: Any, x_BSE: Tensor, weight: Tensor, bias: Tensor | None, regather: Regather) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.regather = regather
        regather.readers += 1
        return F.linear(x_BSE, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BSF: Tensor) -> tuple[Tensor | None, Tensor, Tensor | None, None]:
        (weight,) = ctx.saved_tensors
        # Read whatever is needed of it: all ranks must gather alike.
        x_NE = ctx.regather.read().flatten(0, 1)
        grad_NF = grad_BSF.flatten(0, 1)
        grad_bias = grad_NF.sum(0) if ctx.needs_input_grad[2] else None
        return grad_BSF @ weight, grad_NF.T @ x_NE, grad_bias, None
