"""Linear and embedding layers whose weights are split over the tensor-parallel ranks (Shoeybi et al. 2019).

Legend: B batch, S sequence, E width of the residual stream.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megazebra.parallel.collectives import leave_tensor_parallel, reduce_gradient
from megazebra.parallel.mesh import Group
from megazebra.parallel.regather import LinearWithRegather, Regather
from megazebra.parallel.sharding import mark_sharded


def split_evenly(size: int, tp: Group, what: str) -> int:
    """Share of one rank. Raises ValueError when `size` is not divisible by the group's size."""
    if size % tp.size:
        raise ValueError(f"{what}={size} is not divisible by the tensor-parallel size {tp.size}")
    return size // tp.size


class ColumnParallelLinear(nn.Module):
    """Y_r = X W_r^T + b_r: each rank has a slice of the output features.

    The input comes from `column_input`, once for all column-parallel layers that share it, and is whole:
    [B, S, in]; the output is [B, S, out/tp].
    Raises ValueError when `out_features` is not divisible by tp.
    """

    def __init__(self, in_features: int, out_features: int, tp: Group, *, bias: bool, name: str) -> None:
        super().__init__()
        rows = split_evenly(out_features, tp, name)
        self.weight = nn.Parameter(torch.empty(rows, in_features))
        mark_sharded(self.weight, dim=0, full_size=out_features)
        self.bias = nn.Parameter(torch.zeros(rows)) if bias else None
        if self.bias is not None:
            mark_sharded(self.bias, dim=0, full_size=out_features)

    def forward(self, x_BSE: Tensor, shard_BSE: Tensor | None = None, regather: Regather | None = None) -> Tensor:
        if regather is None:
            return F.linear(x_BSE, self.weight, self.bias)
        return LinearWithRegather.apply(x_BSE, self.weight, self.bias, shard_BSE, regather)


class RowParallelLinear(nn.Module):
    """Y = sum_r X_r W_r^T + b: each rank has a slice of the input features.

    Input [B, S, in/tp] from column-parallel layers; output [B, S, out], or [B, S/tp, out] under sequence
    parallelism. Raises ValueError when `in_features` is not divisible by tp.
    """

    def __init__(
        self, in_features: int, out_features: int, tp: Group, *, bias: bool, sequence_parallel: bool, name: str
    ) -> None:
        super().__init__()
        self.tp = tp
        self.sequence_parallel = sequence_parallel
        self.name = name
        self.weight = nn.Parameter(torch.empty(out_features, split_evenly(in_features, tp, name)))
        mark_sharded(self.weight, dim=1, full_size=in_features)
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    def forward(self, x_BSF: Tensor) -> Tensor:
        partial = F.linear(x_BSF, self.weight)
        out = leave_tensor_parallel(partial, self.tp, sequence_parallel=self.sequence_parallel, label=self.name)
        if self.bias is None:
            return out
        # Added after the sum, so once; under sequence parallelism each rank sees its own positions only.
        return out + (reduce_gradient(self.bias, self.tp, self.name) if self.sequence_parallel else self.bias)


class VocabParallelEmbedding(nn.Module):
    """Token embedding with the vocabulary split over tp, padded to a multiple of it.

    Input [B, S] int64; output [B, S, E], or [B, S/tp, E] under sequence parallelism.
    """

    def __init__(self, vocab_size: int, hidden_size: int, tp: Group, *, sequence_parallel: bool) -> None:
        super().__init__()
        self.tp = tp
        self.sequence_parallel = sequence_parallel
        rows = -(-vocab_size // tp.size)
        self.first_token = tp.rank * rows
        self.weight = nn.Parameter(torch.empty(rows, hidden_size))
        mark_sharded(self.weight, dim=0, full_size=vocab_size)

    def forward(self, tokens_BS: Tensor) -> Tensor:
        if self.tp.size == 1:
            return F.embedding(tokens_BS, self.weight)
        local_BS = tokens_BS - self.first_token
        elsewhere_BS = (local_BS < 0) | (local_BS >= self.weight.shape[0])
        partial_BSE = F.embedding(local_BS.masked_fill(elsewhere_BS, 0), self.weight)
        partial_BSE = partial_BSE.masked_fill(elsewhere_BS[..., None], 0)
        return leave_tensor_parallel(
            partial_BSE, self.tp, sequence_parallel=self.sequence_parallel, label="embed_tokens"
        )
