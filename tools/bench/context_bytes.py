"""What ranks receive in layers of any size: one process takes the place of each rank in turn.

The strategies run as they are, on tensors that have a shape and no data, in a process group that sends nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from bench.context_layer import NO_KERNEL, forward, tensors
from megazebra.config.schema import ParallelConfig
from megazebra.context.traffic import Received, Shape
from megazebra.parallel.mesh import ParallelMesh
from megazebra.pattern import AttentionSpec


def count(specs: Sequence[AttentionSpec], shape: Shape, rank: int) -> list[Received]:
    """Bytes that the rank receives in each of the layers, bf16, as its mesh counts them."""
    assert shape.element_bytes == 2
    dist.init_process_group("fake", rank=rank, world_size=shape.ranks, store=FakeStore())
    try:
        mesh = ParallelMesh.build(ParallelConfig(context=shape.ranks))
        with FakeTensorMode():
            return [_count_layer(spec, shape, mesh) for spec in specs]
    finally:
        dist.destroy_process_group()


def _count_layer(spec: AttentionSpec, shape: Shape, mesh: ParallelMesh) -> Received:
    mesh.traffic.reset()
    *leaves, dout = tensors(shape, torch.bfloat16, seed=0)
    out = forward(leaves, spec, NO_KERNEL, mesh.cp)
    in_forward = mesh.traffic.total_bytes
    torch.autograd.grad(out, leaves, dout)
    return Received(in_forward, mesh.traffic.total_bytes - in_forward)
