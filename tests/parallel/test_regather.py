"""Column-parallel layers that share an input keep its shard and gather it again: same gradients, less memory."""

from __future__ import annotations

import pytest
import torch
from support.distributed import run_distributed
from torch import Tensor

from megazebra.config.schema import ParallelConfig
from megazebra.parallel.linear import ColumnParallelLinear
from megazebra.parallel.mesh import ParallelMesh
from megazebra.parallel.regather import column_input

B, S, E, WIDTHS = 2, 12, 10, (8, 4, 4)


def run_layers(keep_gathered: bool, bias: bool) -> tuple[list[Tensor], list[int], int]:
    """Gradients of the input and the weights, sizes of what backward keeps, and gathers made."""
    mesh = ParallelMesh.build(ParallelConfig(tensor=2))
    torch.manual_seed(mesh.tp.rank)
    layers = [ColumnParallelLinear(E, width, mesh.tp, bias=bias, name="width") for width in WIDTHS]
    for layer in layers:
        torch.nn.init.normal_(layer.weight)
    shard = torch.randn(B, S // 2, E, requires_grad=True)
    kept: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        entered = column_input(shard, mesh.tp, sequence_parallel=True, keep_gathered=keep_gathered, label="test")
        out = torch.cat([layer(*entered) for layer in layers], dim=-1)
    out.square().sum().backward()
    assert shard.grad is not None
    gradients = [shard.grad, *(p.grad for layer in layers for p in layer.parameters() if p.grad is not None)]
    return gradients, kept, mesh.traffic.by_kind()["tp.all_gather"].calls


def compare(bias: bool) -> None:
    kept_whole, sizes_whole, gathers_whole = run_layers(True, bias)
    kept_shard, sizes_shard, gathers_shard = run_layers(False, bias)
    assert len(kept_whole) == 1 + len(WIDTHS) * (2 if bias else 1)
    for expected, found in zip(kept_whole, kept_shard, strict=True):
        # The same products of the same numbers; sums of S * B = 24 of them may be ordered differently.
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert B * S * E in sizes_whole
    assert B * S * E not in sizes_shard
    assert B * S * E // 2 in sizes_shard, "the shard is kept where autograd frees it"
    assert (gathers_whole, gathers_shard) == (1, 2), "once more in backward, for all three layers together"


@pytest.mark.parametrize("bias", [False, True])
def test_gathering_again_gives_the_same_gradients_and_keeps_no_whole_input(bias: bool) -> None:
    run_distributed(compare, 2, bias)


def evaluate() -> None:
    mesh = ParallelMesh.build(ParallelConfig(tensor=2))
    x = torch.randn(B, S // 2, E)
    with torch.no_grad():
        entered = column_input(x, mesh.tp, sequence_parallel=True, keep_gathered=False, label="test")
    assert entered.x_BSE.shape == (B, S, E)
    assert entered.regather is None, "nothing is kept where there is no backward"


def test_without_gradients_nothing_is_kept() -> None:
    run_distributed(evaluate, 2)
