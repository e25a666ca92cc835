"""One process in place of any rank of a large layout: shapes, messages and memory without numbers.

Everything is on the meta device; torch's fake process group takes what is sent and delivers nothing.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megazebra.attention.backend import BackendChoice
from megazebra.attention.packing import Packing
from megazebra.attention.simd import windowed_attention
from megazebra.config import Config
from megazebra.models.build import build_model
from megazebra.models.runtime import ModelRuntime
from megazebra.models.zebra import ZebraModel
from megazebra.parallel.mesh import ParallelMesh
from megazebra.pattern import AttentionSpec

# The fake backend serves tensors on the meta device as any other, but is not registered for them.
dist.Backend.backend_capability["fake"].append("meta")


def become_rank(rank: int, world_size: int) -> None:
    """From here on torch.distributed is as that rank sees it."""
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())


@contextmanager
def rank_of(world_size: int, rank: int) -> Iterator[None]:
    """Inside, torch.distributed is as that rank sees it."""
    become_rank(rank, world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def model_on_paper(config: Config, mesh: ParallelMesh) -> ZebraModel:
    """This rank's model in bf16, all of its layers."""
    runtime = ModelRuntime(
        backend=BackendChoice("simd", _attend, "its operator has shapes for every device, and a kernel on CPUs"),
        sequence_parallel=config.parallel.sequence_parallel and config.parallel.tensor > 1,
        recompute=config.train.recompute,
        loss_chunk=config.train.loss_chunk,
    )
    with torch.device("meta"):
        return build_model(config, mesh, runtime).to(torch.bfloat16)


def _attend(
    q_BSHD: Tensor, k_BTGD: Tensor, v_BTGD: Tensor, *, spec: AttentionSpec, packing: Packing | None,
    sinks_H: Tensor | None,
) -> Tensor:  # fmt: skip
    assert packing is None
    return windowed_attention(q_BSHD, k_BTGD, v_BTGD, None, sinks_H, spec.window, spec.softcap)[0]


class LiveBytes(TorchDispatchMode):
    """Memory of what operations returned and still exists (`now`), and the most there has been of it (`peak`).

    before: tensors made earlier, which do not count.
    """

    def __init__(self, before: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive = {tensor.untyped_storage()._cdata for tensor in before}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for storage in (leaf.untyped_storage() for leaf in tree_leaves(out) if isinstance(leaf, Tensor)):
            if storage.device.type == "meta" and storage._cdata not in self._alive:
                self._alive.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        return out

    def _freed(self, storage: int, size: int) -> None:
        self._alive.remove(storage)
        self.now -= size
