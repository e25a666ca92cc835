"""The process groups of a run, built once and handed to whoever needs one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta

import torch.distributed as dist

from megazebra.config.schema import ParallelConfig
from megazebra.parallel.traffic import TrafficCounter


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

    @classmethod
    def build(cls, config: ParallelConfig) -> ParallelMesh:
        """The mesh over all ranks of torch.distributed, or of this one process where that is not running.

        Every rank must call it (groups are created collectively).
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
        traffic = TrafficCounter()
        timeout = timedelta(seconds=config.timeout_s)

        def axis(name: str, key: Callable[[int, int, int], object]) -> Group:
            """The group of ranks that agree on `key(dp rank, cp rank, tp rank)`."""
            members: dict[object, list[int]] = {}
            for other in range(world):
                members.setdefault(key(other // (tp * cp), other // tp % cp, other % tp), []).append(other)
            own = None
            for ranks in members.values():
                process_group = None
                if distributed:  # a group of all ranks exists already, with its communicator
                    process_group = dist.group.WORLD if len(ranks) == world else dist.new_group(ranks, timeout=timeout)
                if rank in ranks:
                    own = Group(name, tuple(ranks), ranks.index(rank), process_group, traffic)
            assert own is not None
            return own

        return cls(
            dp=axis("dp", lambda d, c, t: (c, t)),
            cp=axis("cp", lambda d, c, t: (d, t)),
            tp=axis("tp", lambda d, c, t: (d, c)),
            dp_cp=axis("dp_cp", lambda d, c, t: t),
            world=axis("world", lambda d, c, t: None),
            traffic=traffic,
        )

    def describe(self) -> str:
        return f"dp {self.dp.size} x cp {self.cp.size} x tp {self.tp.size}"
