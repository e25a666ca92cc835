"""The mesh: who talks to whom."""

from __future__ import annotations

import pytest
import torch
from support.distributed import run_distributed

from megazebra.config import ParallelConfig
from megazebra.parallel.collectives import all_reduce, gather_objects
from megazebra.parallel.mesh import ParallelMesh

LAYOUTS = [(1, 1), (2, 1), (1, 2), (2, 2), (4, 2), (8, 1), (1, 8)]  # (tensor, context)
NAMES = ("dp", "cp", "tp", "dp_cp", "world")


def _members(layouts: list[tuple[int, int]]) -> list[dict[str, tuple[tuple[int, ...], int, int]]]:
    """For each layout and group: the ranks it names, this rank's place, and the ranks it really reaches (as bits)."""
    seen = []
    for tensor, context in layouts:
        mesh = ParallelMesh.build(ParallelConfig(tensor=tensor, context=context))
        me = torch.tensor([1 << mesh.world.rank])
        seen.append(
            {
                name: (group.ranks, group.rank, int(all_reduce(me.clone(), group)))
                for name in NAMES
                for group in [getattr(mesh, name)]
            }
        )
        assert mesh.dp.size * mesh.cp.size * mesh.tp.size == mesh.world.size
        assert mesh.describe() == f"dp {mesh.dp.size} x cp {context} x tp {tensor}"
    with pytest.raises(ValueError, match=r"world size 8 is not divisible by parallel.tensor \* parallel.context = 3 "):
        ParallelMesh.build(ParallelConfig(tensor=3))
    return seen


def test_groups_of_eight_ranks() -> None:
    results = run_distributed(_members, 8, LAYOUTS)
    for rank, layouts in enumerate(results):
        for (tp, cp), groups in zip(LAYOUTS, layouts, strict=True):
            # rank = (d * cp + c) * tp + t, written down again here: tp fastest, then cp, then dp.
            d, c, t = rank // (tp * cp), rank // tp % cp, rank % tp
            dp = 8 // (tp * cp)
            expected = {
                "dp": ([(e * cp + c) * tp + t for e in range(dp)], d),
                "cp": ([(d * cp + e) * tp + t for e in range(cp)], c),
                "tp": ([(d * cp + c) * tp + e for e in range(tp)], t),
                "dp_cp": ([e * tp + t for e in range(dp * cp)], d * cp + c),
                "world": (list(range(8)), rank),
            }
            for name, (ranks, place) in expected.items():
                assert groups[name] == (tuple(ranks), place, sum(1 << r for r in ranks)), (name, tp, cp, rank)


def test_one_process_without_torch_distributed() -> None:
    mesh = ParallelMesh.build(ParallelConfig())
    for name in NAMES:
        group = getattr(mesh, name)
        assert (group.name, group.ranks, group.rank, group.size, group.process_group) == (name, (0,), 0, 1, None)
        assert group.traffic is mesh.traffic
    assert gather_objects("x", mesh.world) == ["x"]
    with pytest.raises(ValueError, match=r"= 2 \* 3; start a multiple of 6 processes"):
        ParallelMesh.build(ParallelConfig(tensor=2, context=3))


def _timeouts(seconds: float) -> list[float]:
    mesh = ParallelMesh.build(ParallelConfig(tensor=2, timeout_s=seconds))
    groups = (mesh.tp, mesh.dp, mesh.dp_cp)
    return [g.process_group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for g in groups]


def test_every_group_waits_no_longer_than_configured() -> None:
    assert run_distributed(_timeouts, 4, 45.0)[0] == [45.0] * 3
