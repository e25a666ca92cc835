"""The process groups of a run, built once and handed to whoever needs one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist

from megazebra.config.schema import ParallelConfig
from megazebra.parallel.traffic import TrafficCounter
from megazebra.parallel.waits import HostWaits, Waits, waits_on


@dataclass(frozen=True)
class Group:
    """Ranks that talk to each other along one axis of the mesh.

    name: 'tp', 'cp', 'dp', 'dp_cp' or 'world'; traffic is counted under it.
    ranks: global ranks of the members; `rank` is this process's place among them.
    process_group: torch's handle; None in a run of one process without torch.distributed.
    """

    name: str
    ranks: tuple[int, ...]
    rank: int
    process_group: dist.ProcessGroup | None = None
    traffic: TrafficCounter = field(default_factory=TrafficCounter, compare=False)

    @property
    def size(self) -> int:
        return len(self.ranks)


@dataclass(frozen=True)
class ParallelMesh:
    """dp x cp x tp ranks; tp is the fastest axis, so a tensor-parallel group sits on neighbouring GPUs.

    dp_cp joins the data- and context-parallel axes: the ranks that hold the same weights, over which
    ZeRO shards and gradients are averaged.
    """

    dp: Group
    cp: Group
    tp: Group
    dp_cp: Group
    world: Group
    traffic: TrafficCounter
    waits: Waits = field(default_factory=HostWaits)

    @classmethod
    def build(cls, config: ParallelConfig, device: torch.device | None = None) -> ParallelMesh:
        """The mesh over all ranks of torch.distributed, or of this one process where that is not running.

        Every rank must call it (groups are created collectively). device: connect context-parallel ranks there at once,
        since NCCL wants all ranks in a group's first call, and not every rank has a halo to send.
        Raises ValueError when the world size is not divisible by tensor * context.
        """
        distributed = dist.is_initialized()
        world, rank = (dist.get_world_size(), dist.get_rank()) if distributed else (1, 0)
        tp, cp = config.tensor, config.context
        if world % (tp * cp):
            raise ValueError(
                f"world size {world} is not divisible by parallel.tensor * parallel.context = {tp} * {cp}; "
                f"start a multiple of {tp * cp} processes or lower one of them"
            )
        traffic, waits = TrafficCounter(), waits_on(device)
        traffic.watchers.append(waits)
        timeout = timedelta(seconds=config.timeout_s)

        def axis(name: str, key: Callable[[int, int, int], object], *, alone: bool = False) -> Group:
            """The ranks that agree on `key(dp rank, cp rank, tp rank)`; alone: with a communicator of their own."""
            members: dict[object, list[int]] = {}
            for other in range(world):
                members.setdefault(key(other // (tp * cp), other // tp % cp, other % tp), []).append(other)
            own = None
            for ranks in members.values():
                process_group = None
                if distributed and len(ranks) == world and not alone:  # that group exists already
                    process_group = dist.group.WORLD
                elif distributed:
                    process_group = dist.new_group(ranks, timeout=timeout)
                if rank in ranks:
                    own = Group(name, tuple(ranks), ranks.index(rank), process_group, traffic)
            assert own is not None
            return own

        # On a communicator of their own, halos don't wait behind ZeRO's reductions.
        sharing_sequences = axis("cp", lambda d, c, t: (d, t), alone=cp > 1)
        if device is not None and cp > 1:
            dist.all_reduce(torch.zeros(1, device=device), group=sharing_sequences.process_group)
        return cls(
            dp=axis("dp", lambda d, c, t: (c, t)),
            cp=sharing_sequences,
            tp=axis("tp", lambda d, c, t: (d, c)),
            dp_cp=axis("dp_cp", lambda d, c, t: t),
            world=axis("world", lambda d, c, t: None),
            traffic=traffic,
            waits=waits,
        )

    def describe(self) -> str:
        return f"dp {self.dp.size} x cp {self.cp.size} x tp {self.tp.size}"
