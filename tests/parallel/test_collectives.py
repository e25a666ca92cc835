"""Collectives: values, gradients, and what they are counted as. Numbers are small integers, so sums are exact."""

from __future__ import annotations

import pytest
import torch
from support.distributed import run_distributed
from torch import Tensor

from megazebra.config import ParallelConfig
from megazebra.parallel import collectives
from megazebra.parallel.mesh import Group, ParallelMesh
from megazebra.parallel.traffic import TrafficCounter

B, S, E = 2, 6, 5  # S of one rank; a batch of two, so that joining along dimension 1 is not a plain concatenation


def _integers(seed: int, *shape: int) -> Tensor:
    return torch.randint(-9, 10, shape, generator=torch.Generator().manual_seed(seed)).double()


def _of_all_ranks(group: Group, seed: int, *shape: int) -> list[Tensor]:
    """What every rank of the group holds, known to each without communication."""
    return [_integers(seed + rank, *shape) for rank in group.ranks]


def _counted(group: Group, kind: str, calls: int, nbytes: int) -> None:
    assert {name: (t.calls, t.bytes) for name, t in group.traffic.by_kind().items()} == (
        {f"{group.name}.{kind}": (calls, nbytes)} if calls else {}
    )
    group.traffic.reset()


def _plain_collectives(group: Group) -> None:
    P, me = group.size, group.rank
    values = _of_all_ranks(group, 10, B, S, E)
    nbytes = B * S * E * 8
    mine = values[me].clone()
    assert collectives.all_reduce(mine, group) is mine
    assert torch.equal(mine, sum(values))
    _counted(group, "all_reduce", 1, 2 * nbytes * (P - 1) // P)
    highest = collectives.all_reduce(values[me].clone(), group, maximum=True)
    assert torch.equal(highest, torch.stack(values).amax(0))
    _counted(group, "all_reduce", 1, 2 * nbytes * (P - 1) // P)
    for dim in (0, 1, 2, -1):
        joined = collectives.all_gather(values[me], group, dim=dim)
        assert torch.equal(joined, torch.cat(values, dim=dim))
        _counted(group, "all_gather", 1, nbytes * P * (P - 1) // P)
    wide = _of_all_ranks(group, 20, B * P, S * P, E * P)
    for dim in (0, 1, 2, -1):
        part = collectives.reduce_scatter(wide[me], group, dim=dim)
        assert torch.equal(part, sum(wide).chunk(P, dim)[me])
        _counted(group, "reduce_scatter", 1, B * S * E * P**3 * 8 * (P - 1) // P)
    assert collectives.gather_objects(("rank", me), group) == [("rank", rank) for rank in range(P)]
    _counted(group, "nothing", 0, 0)
    with pytest.raises(ValueError, match=f"size 7 is not divisible by {group.name} size {P}"):
        collectives.reduce_scatter(torch.zeros(7), group, dim=0)


def _differentiable_collectives(group: Group) -> None:
    P, me = group.size, group.rank
    shards = _of_all_ranks(group, 30, B, S, E)
    whole = _of_all_ranks(group, 40, B, S * P, E)
    n = B * S * P * E * 8  # bytes of the whole sequence
    once, twice = n * (P - 1) // P, 2 * n * (P - 1) // P
    same = whole[0]

    # (call, this rank's input, output, all ranks' incoming gradients, gradient of the input, traffic of both ways)
    enter, leave = collectives.enter_tensor_parallel, collectives.leave_tensor_parallel
    cases = [
        (enter, False, same, same, whole, sum(whole), None, ("all_reduce", twice)),
        (
            enter, True, shards[me], torch.cat(shards, 1), whole, sum(whole).chunk(P, 1)[me],
            ("all_gather", once), ("reduce_scatter", once),
        ),
        (leave, False, whole[me], sum(whole), [same] * P, same, ("all_reduce", twice), None),
        (
            leave, True, whole[me], sum(whole).chunk(P, 1)[me], shards, torch.cat(shards, 1),
            ("reduce_scatter", once), ("all_gather", once),
        ),
    ]  # fmt: skip
    for function, sequence_parallel, value, out, gradients, gradient, forth, back in cases:
        x = value.clone().requires_grad_()
        y = function(x, group, sequence_parallel=sequence_parallel, label="here")
        assert torch.equal(y, out)
        assert torch.equal(x, value), "the input is left alone"
        _counted(group, *((forth[0], 1, forth[1]) if forth else ("nothing", 0, 0)))
        incoming = gradients[me].clone()
        y.backward(incoming)
        assert torch.equal(x.grad, gradient)
        assert torch.equal(incoming, gradients[me]), "the incoming gradient belongs to others too"
        _counted(group, *((back[0], 1, back[1]) if back else ("nothing", 0, 0)))

    weight = torch.nn.Parameter(same.clone())
    passed = collectives.reduce_gradient(weight, group, "norm")
    assert torch.equal(passed, weight)
    incoming = whole[me].clone()
    passed.backward(incoming)
    assert torch.equal(weight.grad, sum(whole))
    assert torch.equal(incoming, whole[me])
    assert list(group.traffic.tallies) == [("tp", "all_reduce", "norm")]
    _counted(group, "all_reduce", 1, twice)


def _groups_of_one_cost_nothing(group: Group) -> None:
    x = torch.ones(2, 3, 4, requires_grad=True)
    assert collectives.all_reduce(x, group) is x
    assert collectives.all_gather(x, group, dim=1) is x
    assert collectives.reduce_scatter(x, group, dim=1) is x
    assert collectives.reduce_gradient(x, group) is x
    for sequence_parallel in (False, True):
        assert collectives.enter_tensor_parallel(x, group, sequence_parallel=sequence_parallel) is x
        assert collectives.leave_tensor_parallel(x, group, sequence_parallel=sequence_parallel) is x
    _counted(group, "nothing", 0, 0)


def _on_every_rank() -> None:
    for tensor in (4, 2):
        mesh = ParallelMesh.build(ParallelConfig(tensor=tensor))
        for group in (mesh.tp, mesh.dp, mesh.world):
            (_plain_collectives if group.size > 1 else _groups_of_one_cost_nothing)(group)
        _differentiable_collectives(mesh.tp)


def test_values_gradients_and_counts() -> None:
    run_distributed(_on_every_rank, 4)


def test_one_process() -> None:
    _groups_of_one_cost_nothing(ParallelMesh.build(ParallelConfig()).tp)


def test_counter_formulas() -> None:
    counter = TrafficCounter()
    for kind, nbytes in [("all_gather", 75), ("reduce_scatter", 75), ("all_reduce", 150), ("broadcast", 100)]:
        counter.record(kind, "tp", 4, 100, "a")
        counter.record(kind, "tp", 4, 100, "b")
        counter.record(kind, "dp", 2, 10, "a")
        tally = counter.by_kind()[f"tp.{kind}"]
        assert (tally.calls, tally.bytes) == (2, 2 * nbytes)
        assert counter.tallies["tp", kind, "b"].bytes == nbytes
    assert counter.total_bytes == 2 * (75 + 75 + 150 + 100) + 5 + 5 + 10 + 10
    counter.reset()
    assert counter.total_bytes == 0
    assert counter.by_kind() == {}
