"""Attention over context-parallel ranks is attention: outputs and gradients of every strategy, in every corner.

The reference is the dense oracle on one rank, in float64; what is left between the two is float64's rounding.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from support.distributed import run_distributed
from torch import Tensor

from megazebra.attention.backend import BackendChoice, resolve_backend
from megazebra.attention.packing import Packing
from megazebra.config.schema import ParallelConfig, RopeConfig
from megazebra.context.replay import Replay
from megazebra.context.strategy import load_strategy
from megazebra.parallel.mesh import ParallelMesh
from megazebra.pattern import AttentionSpec

CPU = torch.device("cpu")
D = 8
# float64 (1.1e-16) through a few hundred sums of numbers of size one.
RELATIVE = 1e-13


@dataclass(frozen=True)
class Case:
    strategy: str
    window: int | None
    lengths: tuple[tuple[int, ...], ...] | None  # of the documents of whole rows
    seq_len: int = 48
    heads: int = 12
    kv_heads: int = 12
    sinks: bool = False
    softcap: float | None = None

    @property
    def spec(self) -> AttentionSpec:
        return AttentionSpec(self.window, RopeConfig(), self.sinks, self.softcap, self.strategy)

    @property
    def rows(self) -> int:
        return len(self.lengths) if self.lengths else 2


# With 4 ranks of 12 tokens: ends at 12, 24, 36. Documents that end there, one short of it, one over it; long and short.
DOCUMENTS = (
    None,
    ((12, 36), (13, 11, 24)),
    ((11, 1, 1, 35), (24, 24)),
    ((1,) * 48, (48,)),
    ((5, 30, 2, 11),),
)
# The query's own key; one key of the neighbour; a shard but one, a shard, one more; several shards; more than all.
WINDOWS = (1, 2, 11, 12, 13, 14, 29, 48, 100)


def cases(ranks: int) -> Iterator[Case]:
    for window, lengths in itertools.product(WINDOWS, DOCUMENTS):
        yield Case("halo", window, lengths, kv_heads=4)
    for strategy, window, lengths in itertools.product(("ulysses", "allgather"), (None, 14), DOCUMENTS):
        yield Case(strategy, window, lengths)
    for kv_heads in (1, 2, 3, 4, 6):
        yield Case("ulysses", None, None, kv_heads=kv_heads)
        yield Case("allgather", None, DOCUMENTS[1], kv_heads=kv_heads)
        yield Case("halo", 14, DOCUMENTS[1], kv_heads=kv_heads)
    for strategy, window in (("halo", 5), ("ulysses", None), ("allgather", None), ("allgather", 5)):
        yield Case(strategy, window, DOCUMENTS[1], sinks=True, kv_heads=6)
        yield Case(strategy, window, None, softcap=2.0, sinks=True, kv_heads=4)


def oracle(name: str, dtype: torch.dtype = torch.float32) -> BackendChoice:
    return resolve_backend(name, [], head_dim=D, dtype=dtype, device=CPU)


def inputs(case: Case, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """q, k, v, the gradient of the output, and sinks where there are any; of whole sequences, as `dtype` holds them."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(case.rows, case.seq_len, heads, D) for heads in (case.heads, case.kv_heads, case.kv_heads, case.heads)]
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    return [*tensors, torch.randn(case.heads, generator=generator, dtype=torch.float64)] if case.sinks else tensors


def packing_of(case: Case) -> Packing | None:
    return Packing.from_document_lengths(case.lengths) if case.lengths else None


def expected(case: Case, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Output and the gradients of q, k, v (and the sinks), by the oracle on whole sequences, in float64."""
    q, k, v, dout, *sinks = (x.double() for x in inputs(case, dtype))
    leaves = [x.requires_grad_() for x in (q, k, v, *sinks)]
    out = oracle("reference").attend(
        q, k, v, spec=case.spec, packing=packing_of(case), sinks_H=sinks[0] if sinks else None
    )
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def found(case: Case, mesh: ParallelMesh, backend: BackendChoice, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """The same of this rank's part, by the case's strategy."""
    q, k, v, dout, *sinks = inputs(case, dtype)
    n = case.seq_len // mesh.cp.size
    part = slice(mesh.cp.rank * n, (mesh.cp.rank + 1) * n)
    leaves = [x[:, part].detach().requires_grad_() for x in (q, k, v)] + [x.requires_grad_() for x in sinks]
    attend = load_strategy(case.strategy, mesh.cp)
    out = attend(
        *leaves[:3], spec=case.spec, packing=packing_of(case), backend=backend, group=mesh.cp,
        sinks_H=leaves[3] if sinks else None, label="x",
    )  # fmt: skip
    return [out.detach(), *torch.autograd.grad(out, leaves, dout[:, part])]


def all_found(ranks: int) -> list[list[Tensor]]:
    mesh = ParallelMesh.build(ParallelConfig(context=ranks))
    return [found(case, mesh, oracle("blocked")) for case in cases(ranks)]


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_every_strategy_equals_the_oracle(ranks: int) -> None:
    of_ranks = run_distributed(all_found, ranks, ranks)
    for number, case in enumerate(cases(ranks)):
        whole = expected(case)
        parts = [of_rank[number] for of_rank in of_ranks]
        joined = [torch.cat([part[i] for part in parts], dim=1) for i in range(4)]
        joined += [torch.stack([part[i] for part in parts]).sum(0) for i in range(4, len(whole))]  # sinks
        for name, own, reference in zip(("out", "dq", "dk", "dv", "dsinks"), joined, whole, strict=False):
            # Where nothing but a query's own key is seen, dq and dk are zero: compared with the size of dv then.
            scale = max(reference.abs().max().item(), whole[3].abs().max().item())
            worst = (own - reference).abs().max().item() / scale
            assert worst <= RELATIVE, (name, case, worst)


# Windows of less than a shard, more, and several; a group of queries for every key head, and documents that break.
BF16_CASES = [
    Case("halo", 9, DOCUMENTS[1], kv_heads=4),
    Case("halo", 30, None, kv_heads=4),
    Case("ulysses", None, DOCUMENTS[1], kv_heads=3),
    Case("allgather", None, DOCUMENTS[1], kv_heads=4),
]


def found_twice_in_bf16(ranks: int) -> list[tuple[list[Tensor], list[Tensor]]]:
    mesh = ParallelMesh.build(ParallelConfig(context=ranks))
    backend = oracle("blocked", torch.bfloat16)
    first, second = ([found(case, mesh, backend, torch.bfloat16) for case in BF16_CASES] for _ in range(2))
    return list(zip(first, second, strict=True))


def test_bf16_strays_little_further_than_on_one_rank_and_always_alike() -> None:
    of_ranks = run_distributed(found_twice_in_bf16, 4, 4)
    for number, case in enumerate(BF16_CASES):
        parts = []
        for first, second in (of_rank[number] for of_rank in of_ranks):
            assert all(map(torch.equal, first, second)), f"{case}: another result in a second run"
            parts.append(first)
        one_rank = found(replace(case, strategy="single"), ParallelMesh.build(ParallelConfig()),
                         oracle("blocked", torch.bfloat16), torch.bfloat16)  # fmt: skip
        for i, reference in enumerate(expected(case, torch.bfloat16)):
            joined = torch.cat([part[i] for part in parts], dim=1)
            assert joined.dtype == torch.bfloat16
            # Queries belong to one rank. Keys are read on up to four, each of which rounds its gradient before the
            # sum is rounded: five independent errors in place of one, sqrt(5) = 2.2 times as large together.
            times = 1.01 if i < 2 else 2.3
            assert relative(joined, reference) <= times * relative(one_rank[i], reference), (case, i)


def relative(x: Tensor, reference: Tensor) -> float:
    return ((x.double() - reference).norm() / reference.norm()).item()


def received_in_two_passes(ranks: int) -> list[tuple[int, int]]:
    """Bytes of a first pass through every strategy, and of one that recomputes it."""
    mesh = ParallelMesh.build(ParallelConfig(context=ranks))
    counts = []
    for case in (Case("halo", 14, DOCUMENTS[1]), Case("ulysses", None, None), Case("allgather", None, None)):
        q, k, v, *_ = (x.chunk(ranks, dim=1)[mesh.cp.rank] for x in inputs(case)[:3])
        replay, outs, passes = Replay(), [], []
        for _ in range(2):
            mesh.traffic.reset()
            replay.begin()
            outs.append(
                load_strategy(case.strategy, mesh.cp)(
                    q, k, v, spec=case.spec, packing=packing_of(case), backend=oracle("blocked"), group=mesh.cp,
                    replay=replay,
                )
            )  # fmt: skip
            passes.append(mesh.traffic.total_bytes)
        assert torch.equal(*outs), case
        counts.append((passes[0], passes[1]))
    return counts


def test_a_recomputed_pass_receives_nothing() -> None:
    for rank, counts in enumerate(run_distributed(received_in_two_passes, 3, 3)):
        for strategy, (first, second) in enumerate(counts):
            assert (first > 0) == (rank > 0 or strategy > 0), "only the first rank has no halo"
            assert second == 0
