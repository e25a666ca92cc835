"""Linear layers, embedding and sharding under tensor parallelism, against one unsharded layer in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.distributed import run_distributed
from torch import Tensor, nn

from megazebra.config import ParallelConfig
from megazebra.parallel.collectives import enter_tensor_parallel
from megazebra.parallel.linear import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding, split_evenly
from megazebra.parallel.mesh import Group, ParallelMesh
from megazebra.parallel.sharding import full_shape, is_sharded, mark_sharded, shard_of, unshard

B, S, E, F_, V = 2, 8, 12, 20, 61  # 61 tokens: every tensor-parallel size pads
# Sums of at most V products of numbers of size 1 to 10, in float64 (unit roundoff 1.1e-16) and in another
# order: 61 * 10 * 1.1e-16 = 7e-14, a few layers deep.
TOLERANCE = {"rtol": 0.0, "atol": 1e-12}


def _numbers(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _load(parameter: nn.Parameter, full: Tensor, tp: Group) -> None:
    with torch.no_grad():
        parameter.copy_(shard_of(full, parameter, parameter.shape, tp))


def _full_gradient(parameter: nn.Parameter, tp: Group) -> Tensor:
    return unshard(parameter.grad, parameter, tp)


def _part(full: Tensor, tp: Group, sequence_parallel: bool) -> Tensor:
    return full.chunk(tp.size, dim=1)[tp.rank] if sequence_parallel else full


def _column_then_row(tp: Group, bias: bool, sequence_parallel: bool) -> None:
    full = {
        "up.weight": _numbers(1, F_, E),
        "up.bias": _numbers(2, F_),
        "down.weight": _numbers(3, E, F_),
        "down.bias": _numbers(4, E),
    }
    x_BSE, incoming_BSE = _numbers(5, B, S, E), _numbers(6, B, S, E)
    leaves = {name: value.clone().requires_grad_() for name, value in full.items()}
    x = x_BSE.clone().requires_grad_()
    hidden = F.linear(x, leaves["up.weight"], leaves["up.bias"] if bias else None).square()
    expected = F.linear(hidden, leaves["down.weight"], leaves["down.bias"] if bias else None)
    expected.backward(incoming_BSE)

    layers = nn.ModuleDict(
        {
            "up": ColumnParallelLinear(E, F_, tp, bias=bias, name="up"),
            "down": RowParallelLinear(F_, E, tp, bias=bias, sequence_parallel=sequence_parallel, name="down"),
        }
    ).double()
    for name, parameter in layers.named_parameters():
        _load(parameter, full[name], tp)
    own_x = _part(x_BSE, tp, sequence_parallel).clone().requires_grad_()
    out = layers["down"](layers["up"](enter_tensor_parallel(own_x, tp, sequence_parallel=sequence_parallel)).square())
    torch.testing.assert_close(out, _part(expected, tp, sequence_parallel), **TOLERANCE)
    out.backward(_part(incoming_BSE, tp, sequence_parallel))
    torch.testing.assert_close(own_x.grad, _part(x.grad, tp, sequence_parallel), **TOLERANCE)
    assert (layers["up"].bias is not None) == bias
    for name, parameter in layers.named_parameters():
        torch.testing.assert_close(_full_gradient(parameter, tp), leaves[name].grad, **TOLERANCE)
        # Only the row-parallel bias is whole on every rank; the norm of the gradient counts it once.
        assert is_sharded(parameter) == (name != "down.bias")


def _embedding(tp: Group, sequence_parallel: bool, vocab_size: int) -> None:
    full = _numbers(7, vocab_size, E)
    tokens_BS = torch.randint(0, vocab_size, (B, S), generator=torch.Generator().manual_seed(8))
    tokens_BS[0, 0], tokens_BS[0, 1] = 0, vocab_size - 1
    incoming_BSE = _numbers(9, B, S, E)
    leaf = full.clone().requires_grad_()
    expected = F.embedding(tokens_BS, leaf)
    expected.backward(incoming_BSE)
    layer = VocabParallelEmbedding(vocab_size, E, tp, sequence_parallel=sequence_parallel).double()
    _load(layer.weight, full, tp)
    out = layer(tokens_BS)
    # One rank contributes the vector and the others zeros: exact.
    assert torch.equal(out, _part(expected, tp, sequence_parallel))
    out.backward(_part(incoming_BSE, tp, sequence_parallel))
    torch.testing.assert_close(_full_gradient(layer.weight, tp), leaf.grad, **TOLERANCE)
    if tp.rank == tp.size - 1 and layer.weight.shape[0] * tp.size > vocab_size:
        assert not layer.weight.grad[-1].any(), "padding rows get no gradient"


def _round_trip(tp: Group) -> None:
    for shape, dim in [((8, 3), 0), ((3, 8), 1), ((5, 3), 0), ((2, 3), 0), ((1, 3), 0), ((8,), 0)]:
        full = _numbers(10, *shape)
        rows = -(-shape[dim] // tp.size)
        shard_shape = torch.Size(rows if d == dim else size for d, size in enumerate(shape))
        parameter = nn.Parameter(torch.empty(shard_shape, dtype=torch.float64))
        mark_sharded(parameter, dim=dim, full_size=shape[dim])
        assert full_shape(parameter, parameter.shape) == shape
        shard = shard_of(full, parameter, parameter.shape, tp)
        assert shard.shape == shard_shape
        assert torch.equal(unshard(shard, parameter, tp), full)
        beyond = max(0, (tp.rank + 1) * rows - shape[dim])  # padding on this rank; it is zero
        padding = min(rows, beyond)
        assert not shard.narrow(dim, rows - padding, padding).any()
    whole = nn.Parameter(full)
    assert not is_sharded(whole)
    assert full_shape(whole, whole.shape) == full.shape
    assert shard_of(full, whole, whole.shape, tp) is full
    assert unshard(full, whole, tp) is full


def _on_every_rank() -> None:
    for tensor in (1, 2, 4):
        tp = ParallelMesh.build(ParallelConfig(tensor=tensor)).tp
        _round_trip(tp)
        for sequence_parallel in (False, True):
            for bias in (False, True):
                _column_then_row(tp, bias, sequence_parallel)
            for vocab_size in (V, 3):
                _embedding(tp, sequence_parallel, vocab_size)
    for make in (
        lambda: ColumnParallelLinear(4, 6, tp, bias=False, name="model.width"),
        lambda: RowParallelLinear(6, 4, tp, bias=False, sequence_parallel=False, name="model.width"),
        lambda: split_evenly(6, tp, "model.width"),
    ):
        with pytest.raises(ValueError, match=r"model\.width=6 is not divisible by the tensor-parallel size 4"):
            make()


def test_layers_equal_unsharded_ones() -> None:
    run_distributed(_on_every_rank, 4)
