"""Measure windowed attention against what torch has, all sides in turns in this process.

    python tools/bench_attention.py --png cost.png   # most of an hour on a quiet machine; --quick takes a minute
    python tools/bench_attention.py --device cuda    # every GPU backend against SDPA; has never run on a GPU

CPU seconds of one thread, medians over rounds; a ratio says how many times less ours takes, in the worst of the shapes.
Operations are those inside the band (4 D per visible pair and head; backward 2.5 times forward), the peak is torch.mm
of 2048 x 2048 in the same dtype. All sides have glibc's allocator keep its memory between calls. A backend that
differs from the float64 reference is not measured.
  window       share of the peak, and against the fastest of torch's block forms (SDPA or products, views or copies)
  shapes       the same for windows of 128 and 2048, grouped queries and a peaked softmax
  length       forward and backward over the length, against full causal SDPA; the exponent of the time
  band         against SDPA with the window as a mask, forward and backward
  flex         against compiled FlexAttention (needs g++), forward, all there is on CPU
  threads      wall time of one thread over that of two: needs two quiet cores
  memory       peak of forward and backward, results and workspace, in sizes of q; a process of its own
  determinism  whether results are the same bit for bit over runs and numbers of threads
"""

from __future__ import annotations

from functools import partial
from itertools import product

import torch
from bench.attention_cpu import BENCHES
from bench.attention_cuda import bench_cuda
from bench.attention_problem import check
from bench.attention_settings import QUICK, Settings
from bench.dtypes import DTYPES
from bench.measure import command_line, machine, report, tune_allocator

from megazebra.attention import load_backend, resolve_backend
from megazebra.config.schema import RopeConfig
from megazebra.pattern import AttentionSpec


def main() -> None:
    parser = command_line(__doc__, BENCHES)
    parser.add_argument("--png", metavar="FILE", help="chart of cost over length, drawn by the bench 'length'")
    parser.add_argument("--backend", default="auto", help="ours: auto, or a name from megazebra/attention")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=int, metavar="N", help="times that every side runs (7; --quick: 2)")
    parser.add_argument("--shrink", type=int, default=1, metavar="N", help="divide all lengths by N: to test this tool")
    parser.add_argument("--plain-allocator", action="store_true", help="leave glibc's allocator as it is")
    parsed = parser.parse_args()
    allocator = "as it is" if parsed.plain_allocator else tune_allocator()
    torch.set_num_threads(1)
    print(f"machine    {machine()}")
    if parsed.device == "cuda":
        settings = Settings(backend="all", shrink=parsed.shrink, **(QUICK if parsed.quick else {}))
        report({"cuda": partial(bench_cuda, settings)}, None, parsed.json)
        return
    print(f"allocator  {allocator}")
    try:
        choice = choose_backend(parsed.backend)
    except ValueError as error:
        parser.error(str(error))
    sizes = (QUICK if parsed.quick else {}) | ({"rounds": parsed.rounds} if parsed.rounds else {})
    settings = Settings(backend=choice, shrink=parsed.shrink, png=parsed.png, **sizes)
    for dtype, D in product(DTYPES, settings.head_dims):
        if why := check(settings.backend, settings.problem(4096, D, dtype), torch.device("cpu")):
            raise SystemExit(f"backend {settings.backend} is not measured: {why}")
    report({name: partial(bench, settings) for name, bench in BENCHES.items()}, parsed.only, parsed.json)


def choose_backend(asked: str) -> str:
    """What training would take on this machine; prints why. Raises ValueError when it can't run here."""
    spec = AttentionSpec(window=512, rope=RopeConfig())
    choice = resolve_backend(asked, [spec], head_dim=64, dtype=torch.float32, device=torch.device("cpu"))
    reason = choice.reason
    if hasattr(backend := load_backend(choice.name), "instruction_sets"):  # a compiled one
        reason += f", with {backend.instruction_sets()[0]}"
    print(f"ours       {reason}")
    return choice.name


if __name__ == "__main__":
    main()
