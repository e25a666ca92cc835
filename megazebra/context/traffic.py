"""What a layer's attention receives from other ranks, by strategy. Exact: tests count the same bytes. No torch.

Legend: B rows of a micro-batch, S tokens of a whole sequence, P context-parallel ranks, n = S/P tokens of a rank,
H query heads and G key/value heads of one tensor-parallel rank, D head dim, w window.

For long sequences without documents, per row and forward pass, in elements (Megatron's and DeepSpeed's formulas for
the last two; Jacobs et al. 2023):

    halo        2 G D (w - 1)                       whatever S and P
    ulysses     (2 H + 2 G) D (S / P) (P - 1) / P   max(G, P) for G where there are fewer key/value heads than ranks
    allgather   2 G D S (P - 1) / P                 and, in global layers, half of the queries and of the outputs
"""

from __future__ import annotations

from dataclasses import dataclass

from megazebra.context.dealing import deal_queries
from megazebra.context.heads import HeadSplit
from megazebra.pattern import AttentionSpec


@dataclass(frozen=True)
class Shape:
    """seq_len: S, a multiple of `ranks`. heads, kv_heads: those of one tensor-parallel rank. element_bytes: of q."""

    batch: int
    seq_len: int
    heads: int
    kv_heads: int
    head_dim: int
    ranks: int
    element_bytes: int

    @property
    def local_len(self) -> int:
        return self.seq_len // self.ranks


@dataclass(frozen=True)
class Received:
    """Bytes that one rank receives in the forward and in the backward pass of one layer."""

    forward: int
    backward: int

    @property
    def total(self) -> int:
        return self.forward + self.backward


def received(strategy: str, spec: AttentionSpec, shape: Shape, rank: int) -> Received:
    """For one micro-batch of sequences that are one document each.

    Documents can only make a halo smaller; under `allgather` other queries may move than these.
    """
    if shape.ranks == 1:
        return Received(0, 0)
    return _FORMULAS[strategy](spec, shape, rank)


def busiest(strategy: str, spec: AttentionSpec, shape: Shape) -> Received:
    """The most that any rank receives in each pass: the first rank has no halo, the last one lends none."""
    ranks = [received(strategy, spec, shape, rank) for rank in range(shape.ranks)]
    return Received(max(each.forward for each in ranks), max(each.backward for each in ranks))


def _halo(spec: AttentionSpec, shape: Shape, rank: int) -> Received:
    """Keys and values in, their gradients back in the same dtype."""
    assert spec.window is not None
    reach, n = spec.window - 1, shape.local_len
    borrowed = min(reach, rank * n)
    # Of this rank's keys, the rank d to the right reads what its window leaves of them.
    lent = sum(max(0, min(n, reach - (d - 1) * n)) for d in range(1, shape.ranks - rank))
    one_key = 2 * shape.batch * shape.kv_heads * shape.head_dim * shape.element_bytes
    return Received(borrowed * one_key, lent * one_key)


def _ulysses(spec: AttentionSpec, shape: Shape, rank: int) -> Received:
    """Queries, keys and values of this rank's heads in, outputs back; the same for the gradients, the other way."""
    split = HeadSplit.of(shape.heads, shape.kv_heads, shape.ranks)
    one_head = shape.batch * shape.local_len * shape.head_dim * shape.element_bytes
    others = shape.ranks - 1
    keys = [len(split.kv_heads(other)) for other in range(shape.ranks)]
    queries_and_outputs = 2 * split.heads_per_rank * others
    return Received(
        forward=(queries_and_outputs + 2 * keys[rank] * others) * one_head,
        backward=(queries_and_outputs + 2 * (sum(keys) - keys[rank])) * one_head,
    )


def _allgather(spec: AttentionSpec, shape: Shape, rank: int) -> Received:
    """All keys and values in, their gradients scattered in float32; queries that other ranks compute, and outputs."""
    deal = deal_queries(None, shape.seq_len, shape.ranks, spec.window)
    one_row = shape.batch * shape.heads * shape.head_dim * shape.element_bytes
    one_key = 2 * shape.batch * shape.kv_heads * shape.head_dim
    keys = shape.local_len * (shape.ranks - 1)
    rows = deal.rows_in(rank) + deal.rows_out(rank)
    return Received(keys * one_key * shape.element_bytes + rows * one_row, keys * one_key * 4 + rows * one_row)


_FORMULAS = {"halo": _halo, "ulysses": _ulysses, "allgather": _allgather}
STRATEGIES = tuple(_FORMULAS)
