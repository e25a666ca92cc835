"""Measure context parallelism against gathering all keys in every layer: bytes, and time over a slow link.

    python tools/bench_context.py            # minutes on two quiet cores; --quick takes one
    python tools/bench_context.py --only bytes

A ratio says how many times less ours takes: local layers under `halo`, global layers under `ulysses` as `auto` chooses,
against every layer under `allgather`. Both sides are strategies of this framework (megazebra/context).
  bytes  what the busiest of 8 ranks receives in a group of four layers GLLL of Llama-2-7B's attention in bf16, forward
         and backward, as the mesh counts it while the strategies run; nothing is sent. `allgather` sums gradients in
         float32, which doubles its bytes in backward: the ratio of the forward passes alone is free of that.
  time   one local layer in float32 on two ranks, one thread each, in turns; between them a link of 1 Gbit/s each way:
         two network namespaces joined by a veth pair that `tc` limits. Wall time, medians, the slower rank.
         Time in communication is that of the exchange alone: the same forward and backward pass of the strategy, with
         its copies, around a kernel that computes nothing. So what `halo` hides behind computation counts in full.
         gloo reduce-scatters by an all-reduce, which sends more than `allgather` counts: `over the link` says how much.

The bench `time` needs Linux, `ip` and `tc` (Debian: apt-get install iproute2), and root or namespaces of one's own:
    unshare --map-root-user --net --mount sh -c 'mount -t tmpfs none /run && python tools/bench_context.py'
Where they are refused it says so and is left out. Its namespaces go when it ends.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from bench.context_bytes import count
from bench.context_link import LinkRefusedError, slow_link
from bench.context_rank import STRATEGIES, RankResult, Setting, run_ranks
from bench.measure import Row, command_line, machine, report, tune_allocator

from megazebra.config.schema import Config, DataConfig, ModelConfig, ParallelConfig, TrainConfig
from megazebra.context.choice import layer_shape, resolve_specs
from megazebra.context.traffic import Received

QUICK: dict[str, dict[str, Any]] = {
    "bytes": {"lengths": (4096, 32768)},
    "time": {"lengths": (16384, 32768), "rounds": 2},
}
GROUP_OF_LLAMA = ModelConfig(num_layers=4, max_position_embeddings=65536)


@dataclass(frozen=True)
class ByteSetting:
    """Attention of the model's layers, its sequences shared by `ranks`; the default is a group of Llama-2-7B's.

    seq_len: the one of the ratios; `lengths` are printed.
    """

    seq_len: int = 32768
    lengths: tuple[int, ...] = (4096, 8192, 16384, 32768, 65536)
    ranks: int = 8
    model: ModelConfig = GROUP_OF_LLAMA

    def config(self, seq_len: int) -> Config:
        return Config(
            model=self.model,
            parallel=ParallelConfig(context=self.ranks),
            data=DataConfig(seq_len=seq_len),
            train=TrainConfig(precision="bf16"),
        )


def bench_bytes(setting: ByteSetting) -> Iterator[Row]:
    over_formula, rows = [1.0], []
    for seq_len in setting.lengths:
        config = setting.config(seq_len)
        specs, shape = resolve_specs(config), layer_shape(config)
        gathered_specs = [replace(spec, context="allgather") for spec in specs]
        by_rank = [count([*specs, *gathered_specs], shape, rank) for rank in range(shape.ranks)]
        ours = busiest(layers[: len(specs)] for layers in by_rank)
        theirs = busiest(layers[len(specs) :] for layers in by_rank)
        for spec, (mine, gathered) in dict(zip(specs, zip(ours, theirs, strict=True), strict=True)).items():
            line = f"{spec.kind:6} {spec.context:9} {_megabytes(mine)}, allgather {_megabytes(gathered)}"
            print(f"  S={seq_len:<6} {line}", flush=True)
            if spec.window is not None and spec.context == "halo":
                formula = 2 * shape.kv_heads * shape.head_dim * (spec.window - 1) * shape.element_bytes
                over_formula += [mine.forward / formula, mine.backward / formula]
        if seq_len == setting.seq_len:
            for key, passes in (("comm_bytes_vs_allgather", "total"), ("comm_bytes_vs_allgather_fwd", "forward")):
                sums = [sum(getattr(layer, passes) for layer in layers) for layers in (theirs, ours)]
                meaning = f"allgather / ours, {sums[0] / 1e6:,.0f} / {sums[1] / 1e6:,.0f} MB in the group"
                rows.append((key, sums[0] / sums[1], meaning))
    yield from rows
    worst = max(over_formula, key=lambda ratio: abs(ratio - 1))
    yield "halo_bytes_over_formula", worst, "2 G D (w - 1) bytes, each way and at all lengths: the farthest from 1"


def busiest(ranks: Iterable[list[Received]]) -> list[Received]:
    """The rank that receives most in all its layers together."""
    return max(ranks, key=lambda layers: sum(layer.total for layer in layers))


def _megabytes(layer: Received) -> str:
    return f"{layer.forward / 1e6:8.2f} + {layer.backward / 1e6:.2f} MB"


def bench_time(setting: Setting, rate: str) -> Iterator[Row]:
    try:
        with slow_link(rate) as ends:
            results = run_ranks(setting, ends)
    except LinkRefusedError as refused:
        print(f"  left out, because there can be no slow link here: {refused}")
        return
    yield from time_rows(results)


def time_rows(results: Sequence[RankResult]) -> Iterator[Row]:
    """Of both ranks the slower one, and the one that received more."""
    yield "link_gbit_per_s", min(rank.link_bits_per_s for rank in results) / 1e9, "measured, one message of 32 MiB"
    for seq_len, names in results[0].sides.items():
        both = {name: [rank.sides[seq_len][name] for rank in results] for name in names}
        ms = {name: 1e3 * max(side.seconds for side in sides) for name, sides in both.items()}
        print(f"  S={seq_len:<6} {'kernel':10} {ms['kernel']:9.1f} ms", flush=True)
        for name in STRATEGIES:
            counted, over_link = (
                f"{max(getattr(side, source) or 0 for side in both[name]) / 1e6:.2f}"
                for source in ("counted", "over_link")
            )
            line = f"{ms[name]:9.1f} ms, exchange alone {ms[f'{name} exchange']:8.1f} ms"
            print(f"  S={seq_len:<6} {name:10} {line}; {counted} MB counted, {over_link} MB over the link", flush=True)
        length, exchange = f"{seq_len // 1024}k", ms["allgather exchange"] / ms["halo exchange"]
        yield f"comm_time_vs_allgather_{length}", exchange, "allgather / halo, the exchange alone"
        yield f"layer_time_vs_allgather_{length}", ms["allgather"] / ms["halo"], "allgather / halo, the whole layer"
        overlap = min(side.overlap for side in both["halo"] if side.overlap is not None)
        yield f"halo_overlap_{length}", overlap, "of the time of its messages, a rank computes"


BENCHES = ("bytes", "time")


def main() -> None:
    parser = command_line(__doc__, BENCHES)
    parser.add_argument("--backend", default="auto", help="kernel of 'time': auto, or a name from megazebra/attention")
    parser.add_argument("--rounds", type=int, metavar="N", help="turns of each side of 'time' (5; --quick: 2)")
    parser.add_argument("--threads", type=int, default=1, help="of each of the two ranks")
    parser.add_argument("--rate", default="1gbit", help="of the link, each way, as tc writes it")
    parsed = parser.parse_args()
    allocator = tune_allocator()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that namespaces go
    print(f"machine    {machine()}, two ranks of {parsed.threads} threads")
    print(f"allocator  {allocator}")
    sizes = QUICK if parsed.quick else {name: {} for name in BENCHES}
    rounds = {"rounds": parsed.rounds} if parsed.rounds else {}
    layer = Setting(threads=parsed.threads, backend=parsed.backend, **(sizes["time"] | rounds))
    benches = {
        "bytes": partial(bench_bytes, ByteSetting(**sizes["bytes"])),
        "time": partial(bench_time, layer, parsed.rate),
    }
    report(benches, parsed.only, parsed.json)


if __name__ == "__main__":
    main()
