"""The two ranks of the bench 'time' in tools/bench_context.py, each a process at one end of a link:

    python -m bench.context_rank SETTING FOLDER RANK [INTERFACE]

SETTING is JSON, and so is what a rank leaves as FOLDER/RANK.json. Ranks find each other through the folder.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bench.context_layer import NO_KERNEL, forward, tensors
from bench.context_link import End, received_bytes
from bench.measure import interleaved, wall_seconds
from megazebra.attention import resolve_backend
from megazebra.attention.backend import BackendChoice
from megazebra.config.schema import ParallelConfig, RopeConfig
from megazebra.context.traffic import Shape
from megazebra.parallel.mesh import Group, ParallelMesh
from megazebra.parallel.traffic import TrafficCounter
from megazebra.pattern import AttentionSpec

RANKS = 2
STRATEGIES = ("halo", "allgather")
SAME = 1e-5  # relative Frobenius distance of two float32 computations of the same attention
PROBE_BYTES = 32 * 2**20  # of the message that measures the link


@dataclass(frozen=True)
class Setting:
    """One local layer in float32, its sequences shared by two ranks. threads: of each rank. backend: the kernel."""

    lengths: tuple[int, ...] = (16384, 32768, 65536)
    heads: int = 8
    head_dim: int = 64
    window: int = 512
    rounds: int = 5
    threads: int = 1
    backend: str = "auto"
    timeout_s: float = 600.0

    def shape(self, seq_len: int) -> Shape:
        return Shape(1, seq_len, self.heads, self.heads, self.head_dim, RANKS, element_bytes=4)


@dataclass(frozen=True)
class Measured:
    """One side on one rank, forward and backward.

    seconds: wall time, the median. counted, over_link: bytes received, as the strategy counts them and as the interface
    does (None without one of its own). overlap: share of the time of messages beside computation in which the rank
    computed; None where there are no such messages.
    """

    seconds: float
    counted: int
    over_link: int | None
    overlap: float | None


@dataclass(frozen=True)
class RankResult:
    """sides: by sequence length and name. link_bits_per_s: of one large message, as the rank saw it."""

    link_bits_per_s: float
    sides: dict[int, dict[str, Measured]]


def run_ranks(setting: Setting, ends: Sequence[End]) -> list[RankResult]:
    """What the ranks measured, one at each end. Raises SystemExit when one of them failed; it has said why."""
    path = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    with tempfile.TemporaryDirectory() as folder:
        processes = []
        try:
            for rank, end in enumerate(ends):
                command = [*end.command, sys.executable, "-m", "bench.context_rank"]
                arguments = [json.dumps(asdict(setting)), folder, str(rank)]
                environment = dict(os.environ, PYTHONPATH=os.pathsep.join(path))
                if end.interface:
                    arguments.append(end.interface)
                    environment["GLOO_SOCKET_IFNAME"] = end.interface
                processes.append(subprocess.Popen([*command, *arguments], env=environment))
            while None in (codes := [process.poll() for process in processes]) and not any(codes):
                time.sleep(0.05)
            if any(codes):
                raise SystemExit("a rank failed, so nothing was measured")
        finally:
            for process in processes:
                process.kill()
                process.wait()
        return [_read(Path(folder) / f"{rank}.json") for rank in range(len(ends))]


def _read(path: Path) -> RankResult:
    result = json.loads(path.read_text())
    sides = {
        int(seq_len): {name: Measured(**measured) for name, measured in sides.items()}
        for seq_len, sides in result["sides"].items()
    }
    return RankResult(result["link_bits_per_s"], sides)


class Side:
    """Forward and backward of the layer in one way, with a counter of its own."""

    def __init__(self, spec: AttentionSpec, backend: BackendChoice, cp: Group, interface: str | None) -> None:
        self.spec, self.backend, self.interface = spec, backend, interface
        self.traffic = TrafficCounter()
        self.group = replace(cp, traffic=self.traffic)
        self.over_link = self.runs = 0

    def run(self, leaves: list[Tensor], dout: Tensor) -> list[Tensor]:
        """The output and the gradients of q, k and v."""
        before = self._received()
        out = forward(leaves, self.spec, self.backend, self.group)
        gradients = torch.autograd.grad(out, leaves, dout)
        self.over_link += self._received() - before
        self.runs += 1
        return [out.detach(), *gradients]

    def measured(self, seconds: float) -> Measured:
        over_link = None if self.interface is None else self.over_link // self.runs
        return Measured(seconds, self.traffic.total_bytes // self.runs, over_link, self.traffic.overlap)

    def _received(self) -> int:
        return 0 if self.interface is None else received_bytes(self.interface)


def measure(setting: Setting, seq_len: int, cp: Group, interface: str | None) -> dict[str, Measured]:
    """By side: 'halo' and 'allgather', each whole and its 'exchange' alone, and the 'kernel' alone on a rank's keys."""
    spec = AttentionSpec(window=setting.window, rope=RopeConfig())
    kernel = resolve_backend(
        setting.backend, [spec], head_dim=setting.head_dim, dtype=torch.float32, device=torch.device("cpu")
    )
    *leaves, dout = tensors(setting.shape(seq_len), torch.float32, seed=cp.rank)
    alone = Group("alone", (cp.ranks[cp.rank],), 0)
    sides = {"kernel": Side(spec, kernel, alone, interface)}
    for name in STRATEGIES:
        named = replace(spec, context=name)
        sides[name] = Side(named, kernel, cp, interface)
        sides[f"{name} exchange"] = Side(named, NO_KERNEL, cp, interface)
    check_same(*(sides[name].run(leaves, dout) for name in STRATEGIES))
    runs: dict[str, Callable[[], Any]] = {name: partial(side.run, leaves, dout) for name, side in sides.items()}
    seconds = interleaved(runs, setting.rounds, _together)
    return {name: side.measured(seconds[name]) for name, side in sides.items()}


def check_same(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> None:
    """Output and gradients of both sides. Raises SystemExit when they are not those of one computation."""
    for name, a, b in zip(("out", "dq", "dk", "dv"), ours, theirs, strict=True):
        error = float((a - b).norm() / b.norm())
        if not error < SAME:
            raise SystemExit(f"halo and allgather do not compute the same: {name} differs by {error:.1e}")


def _together(run: Callable[[], Any]) -> float:
    """Wall seconds of one rank from a moment when all are ready."""
    dist.barrier()
    return wall_seconds(run)


def link_bits_per_s(cp: Group) -> float:
    """Of one large message to rank 1, as that rank sees it."""
    message = torch.zeros(PROBE_BYTES, dtype=torch.uint8)
    send_or_receive = partial(dist.send, message, dst=1) if cp.rank == 0 else partial(dist.recv, message, src=0)
    _together(send_or_receive)  # connections are made by the first message
    return 8 * PROBE_BYTES / _together(send_or_receive)


def main() -> None:
    setting, folder, rank = Setting(**json.loads(sys.argv[1])), Path(sys.argv[2]), int(sys.argv[3])
    interface = sys.argv[4] if len(sys.argv) > 4 else None
    torch.set_num_threads(setting.threads)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=RANKS,
        timeout=timedelta(seconds=setting.timeout_s),
    )
    cp = ParallelMesh.build(ParallelConfig(context=RANKS)).cp
    bits_per_s = link_bits_per_s(cp)
    result = RankResult(bits_per_s, {S: measure(setting, S, cp, interface) for S in setting.lengths})
    (folder / f"{rank}.json").write_text(json.dumps(asdict(result)))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
