"""Column-parallel input under sequence parallelism: keep the shard, gather it again in backward.

A weight's gradient needs the layer's whole input. Kept from forward it costs [B, S, E] per pair of norms
and layers on every rank, whatever the tensor-parallel size; kept as a shard it costs 1/tp of that and one more
all-gather in backward (Korthikanti et al. 2022, section 4.2.2).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from megazebra.parallel.collectives import all_gather, enter_tensor_parallel
from megazebra.parallel.mesh import Group


class Regather:
    """The whole of an input that several layers share, while their backward needs it."""

    def __init__(self, tp: Group, label: str) -> None:
        self.tp = tp
        self.label = label
        self.readers = 0
        self._whole_BSE: Tensor | None = None

    def read(self, shard_BSE: Tensor) -> Tensor:
        """[B, S, E] from the shard [B, S/tp, E]: gathered for the first of its layers, let go after the last."""
        whole_BSE = self._whole_BSE
        if whole_BSE is None:
            whole_BSE = all_gather(shard_BSE, self.tp, dim=1, label=self.label)
        self.readers -= 1
        self._whole_BSE = whole_BSE if self.readers > 0 else None
        return whole_BSE


class ColumnInput(NamedTuple):
    """Whole input of column-parallel layers, and where it comes from again: None keeps it for backward."""

    x_BSE: Tensor
    shard_BSE: Tensor | None = None
    regather: Regather | None = None


def column_input(x_BSE: Tensor, tp: Group, *, sequence_parallel: bool, keep_gathered: bool, label: str) -> ColumnInput:
    """What column-parallel layers take, from the residual stream.

    keep_gathered: keep the whole input for backward after all, as a block that is recomputed anyway should.
    """
    whole_BSE = enter_tensor_parallel(x_BSE, tp, sequence_parallel=sequence_parallel, label=label)
    if tp.size == 1 or not sequence_parallel or keep_gathered or not torch.is_grad_enabled():
        return ColumnInput(whole_BSE)
    return ColumnInput(whole_BSE, x_BSE.detach(), Regather(tp, label))


class LinearWithRegather(torch.autograd.Function):
    """F.linear whose backward reads its input from a Regather in place of a saved tensor."""

    @staticmethod
    def forward(
        ctx: Any, x_BSE: Tensor, weight: Tensor, bias: Tensor | None, shard_BSE: Tensor, regather: Regather
    ) -> Tensor:
        ctx.save_for_backward(shard_BSE, weight)
        ctx.regather = regather
        regather.readers += 1
        return F.linear(x_BSE, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BSF: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        shard_BSE, weight = ctx.saved_tensors
        # Read whatever gradient is wanted: all ranks must gather alike.
        x_NE = ctx.regather.read(shard_BSE).flatten(0, 1)
        grad_NF = grad_BSF.flatten(0, 1)
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        return (
            grad_BSF @ weight if wants_x else None,
            grad_NF.T @ x_NE if wants_weight else None,
            grad_NF.sum(0) if wants_bias else None,
            None,
            None,
        )
