"""The bench of tools/bench_attention.py on a GPU: every windowed backend against full causal SDPA, by CUDA events.

Has never run on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import torch

from bench.attention_problem import PASSES, backend_attend, call, check
from bench.attention_rivals import causal_sdpa
from bench.attention_settings import Settings
from bench.dtypes import DTYPES
from bench.measure import Row, interleaved
from megazebra.attention import backend_names

CUDA = torch.device("cuda")


def cuda_seconds(run: Callable[[], Any]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def bench_cuda(settings: Settings) -> Iterator[Row]:
    """By backend, length and dtype, the worst of the head dims: share of torch.mm inside the band, and SDPA / ours."""
    if not torch.cuda.is_available():
        raise SystemExit("--device cuda needs a GPU that torch can use; torch.cuda.is_available() is False")
    print(f"  {torch.cuda.get_device_name()}, CUDA {torch.version.cuda}; times by CUDA events")
    settings = replace(settings, gemm=4 * settings.gemm)  # a small product does not fill a GPU
    backends = {(dtype, D): _right_backends(settings, dtype, D) for dtype, D in product(DTYPES, settings.head_dims)}
    for dtype, S, (name, backward) in product(DTYPES, settings.lengths, PASSES.items()):
        rows: dict[str, list[float]] = {}
        for D in settings.head_dims:
            problem = settings.problem(S, D, dtype)
            mm, mm_flops = settings.mm(dtype, CUDA)
            sides = {"mm": mm, "sdpa": call(causal_sdpa, problem.tensors(CUDA, heads_first=True), backward)}
            for backend in backends[dtype, D]:
                sides[backend] = call(backend_attend(backend, problem.window), problem.tensors(CUDA), backward)
            seconds = interleaved(sides, settings.rounds, cuda_seconds)
            for backend in backends[dtype, D]:
                share = problem.flops(backward) / seconds[backend] / (mm_flops / seconds["mm"])
                ratio = seconds["sdpa"] / seconds[backend]
                print(f"  {problem!s:44} {name:8} {seconds[backend] * 1e3:8.3f} ms  {backend}", flush=True)
                rows.setdefault(f"{backend}_share_of_mm_{dtype}_{name}_{S // 1024}k", []).append(share)
                rows.setdefault(f"{backend}_vs_sdpa_{dtype}_{name}_{S // 1024}k", []).append(ratio)
        for key, values in rows.items():
            yield key, min(values), "worst of the head dims"


def _right_backends(settings: Settings, dtype: str, D: int) -> list[str]:
    right = []
    for backend in sorted(set(backend_names()) - {"reference"}):
        why = check(backend, settings.problem(4096, D, dtype), CUDA)
        if why is None:
            right.append(backend)
        else:
            print(f"  {dtype} D={D}: {backend} left out: {why}", flush=True)
    return right
