"""The benches of tools/bench_attention.py on CPU: one thread and CPU seconds unless they say otherwise."""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

from bench.attention_chart import draw_cost
from bench.attention_problem import PASSES, Attend, Problem, backend_attend, call, peak_over_q
from bench.attention_rivals import band_sdpa, causal_sdpa, compiled_flex
from bench.attention_settings import Settings
from bench.dtypes import DTYPES
from bench.measure import Row, cpu_name, cpu_seconds, in_fresh_process, interleaved, wall_seconds

OURS, FULL, BLOCKS = "window, ours", "full causal SDPA", "window, blocks in torch"
EXPONENT_FROM = 2048  # tokens; below, the band is not yet full
MIDDLE_BLOCK = 128  # of the block forms in the chart: the best or close to it at any length
CPU = torch.device("cpu")
FORMS_IN_TURNS = 3  # block forms that a first call shows to be the fastest


def bench_window(settings: Settings) -> Iterator[Row]:
    for dtype, (name, backward) in product(DTYPES, PASSES.items()):
        problems = [settings.problem(S, D, dtype) for D, S in product(settings.head_dims, settings.lengths)]
        shares, ratios = zip(*(_against_blocks(settings, problem, backward) for problem in problems), strict=True)
        yield f"share_of_mm_{dtype}_{name}", min(shares), "of the peak of torch.mm, inside the band"
        yield f"vs_blocks_{dtype}_{name}", min(ratios), "best block form / ours"


def bench_shapes(settings: Settings) -> Iterator[Row]:
    changes: dict[str, dict[str, Any]] = {
        "w128": {"window": 128},
        "w2048": {"window": 2048},
        "gqa": {"H": 8, "G": 2},
        "peaked": {"q_factor": 30},
    }
    for shape, dtype in product(changes, DTYPES):
        for name, backward in PASSES.items():
            problems = [settings.problem(settings.other_length, D, dtype, **changes[shape]) for D in settings.head_dims]
            shares, ratios = zip(*(_against_blocks(settings, problem, backward) for problem in problems), strict=True)
            yield f"share_of_mm_{shape}_{dtype}_{name}", min(shares), "of the peak of torch.mm"
            yield f"vs_blocks_{shape}_{dtype}_{name}", min(ratios), "best block form / ours"


def _against_blocks(settings: Settings, problem: Problem, backward: bool) -> tuple[float, float]:
    mm, mm_flops = settings.mm(problem.dtype, CPU)
    tensors = problem.tensors(CPU, heads_first=True)
    calls = {name: call(form, tensors, backward) for name, form in settings.block_forms(problem).items()}
    first = {name: cpu_seconds(run) for name, run in calls.items()}
    fastest = sorted(first, key=lambda name: first[name])[:FORMS_IN_TURNS]
    sides = {"mm": mm, "ours": _ours(settings, problem, backward)} | {name: calls[name] for name in fastest}
    seconds = interleaved(sides, settings.rounds)
    best = min(fastest, key=lambda name: seconds[name])
    share = problem.flops(backward) / seconds["ours"] / (mm_flops / seconds["mm"])
    ratio = seconds[best] / seconds["ours"]
    _line(problem, backward, seconds["ours"], f"{share:6.3f} of mm {ratio:7.2f} x faster than {best}")
    return share, ratio


def bench_length(settings: Settings) -> Iterator[Row]:
    curves: dict[str, dict[str, dict[int, float]]] = {}
    slopes: list[float] = []
    for dtype in DTYPES:
        ratios: dict[int, list[float]] = {}
        for D in settings.head_dims:
            cost = _cost_per_token(settings, D, dtype)
            for S, seconds in cost[FULL].items():
                ratios.setdefault(S, []).append(seconds / cost[OURS][S])
            points = [(math.log(S), math.log(S * each)) for S, each in cost[OURS].items() if S >= EXPONENT_FROM]
            slopes.append(statistics.linear_regression(*zip(*points, strict=True)).slope)
            if settings.head_dims[0] == D:
                curves[f"{dtype}, head dim {D}"] = cost
        for S in sorted(ratios):
            yield f"vs_sdpa_{dtype}_{S // 1024}k", min(ratios[S]), "full causal SDPA / ours, forward and backward"
        shortest = [settings.problem(settings.curve[0], D, dtype) for D in settings.head_dims]
        worst = min(_ratio(settings, problem, full_causal_sdpa, False, H=problem.H) for problem in shortest)
        yield f"vs_sdpa_{dtype}_{settings.curve[0] // 1024}k_fwd", worst, "full causal SDPA / ours, forward"
    yield "time_exponent", max(slopes), f"slope of log time over log S, {EXPONENT_FROM} to {settings.curve[-1]} tokens"
    if settings.png:
        draw_cost(curves, f"One layer with a window of {settings.window}: {cpu_name()}, one thread", Path(settings.png))


def _cost_per_token(settings: Settings, D: int, dtype: str) -> dict[str, dict[int, float]]:
    """CPU seconds per token and head, forward and backward, by side and length; everything in turns."""
    sides: dict[tuple[str, str, Problem], Callable[[], Any]] = {}
    for S in settings.curve:
        ours = settings.problem(S, D, dtype)
        sides[OURS, "", ours] = _ours(settings, ours, True)
        # Torch's sides have their heads one after the other: one of them costs its share of all.
        theirs = settings.problem(S, D, dtype, H=settings.H if settings.all_heads_up_to >= S else 1)
        tensors = theirs.tensors(CPU, heads_first=True)
        if settings.sdpa_up_to >= S:
            sides[FULL, "", theirs] = call(causal_sdpa, tensors, True)
        for form, attend in replace(settings, blocks=(MIDDLE_BLOCK,)).block_forms(theirs).items():
            sides[BLOCKS, form, theirs] = call(attend, tensors, True)
    cost: dict[str, dict[int, float]] = {}
    for (side, form, problem), seconds in interleaved(sides, settings.rounds).items():
        each, of_side = seconds / problem.S / problem.H, cost.setdefault(side, {})
        S = problem.S * settings.shrink
        of_side[S] = min(each, of_side.get(S, math.inf))
        _line(problem, True, seconds, f"{each * 1e6:9.3f} us per token and head  {side} {form}")
    return cost


def full_causal_sdpa(_S: int, _window: int) -> Attend:
    return causal_sdpa


def bench_band(settings: Settings) -> Iterator[Row]:
    for dtype in DTYPES:
        problems = [settings.problem(settings.mask_length, D, dtype) for D in settings.head_dims]
        worst = min(_ratio(settings, problem, band_sdpa, True, H=1) for problem in problems)
        yield f"vs_band_{dtype}_{settings.mask_length // 1024}k", worst, "SDPA with a band mask / ours"


def bench_flex(settings: Settings) -> Iterator[Row]:
    for dtype in DTYPES:
        problems = [settings.problem(settings.mask_length, D, dtype) for D in settings.head_dims]
        worst = min(_ratio(settings, problem, compiled_flex, False, H=problem.H) for problem in problems)
        yield f"vs_flex_{dtype}_fwd", worst, "compiled FlexAttention / ours, forward"


def _ratio(settings: Settings, ours: Problem, rival: Callable[[int, int], Attend], backward: bool, H: int) -> float:
    """Per head, of which the rival computes H: its heads lie one after the other."""
    theirs = replace(ours, H=H, G=H)
    sides = {
        "ours": _ours(settings, ours, backward),
        "rival": call(rival(ours.S, ours.window), theirs.tensors(CPU, heads_first=True), backward),
    }
    seconds = interleaved(sides, settings.rounds)
    ratio = (seconds["rival"] / theirs.H) / (seconds["ours"] / ours.H)
    _line(ours, backward, seconds["ours"], f"{ratio:7.2f} x faster than {rival.__name__}")
    return ratio


def bench_threads(settings: Settings) -> Iterator[Row]:
    if (os.cpu_count() or 1) < 2:
        print("  left out: this machine has one core")
        return
    ratios = []
    for dtype, (_, backward) in product(DTYPES, PASSES.items()):
        problem = settings.problem(settings.other_length, settings.head_dims[0], dtype)
        run = _ours(settings, problem, backward)
        seconds = interleaved({n: partial(_with_threads, n, run) for n in (1, 2)}, settings.rounds, wall_seconds)
        ratios.append(seconds[1] / seconds[2])
        _line(problem, backward, seconds[2], f"{ratios[-1]:7.2f} x faster with two threads than with one (wall time)")
    yield "threads_2_over_1", min(ratios), "wall time of one thread / two"


def bench_memory(settings: Settings) -> Iterator[Row]:
    for dtype in DTYPES:
        sizes = []
        for D in settings.head_dims:
            problem = settings.problem(settings.memory_length, D, dtype, H=8)
            sizes.append(in_fresh_process(peak_over_q, settings.backend, problem))
            print(f"  {problem!s:44} {sizes[-1]:7.2f} x q at the peak", flush=True)
        yield f"memory_over_q_{dtype}", max(sizes), "peak of forward and backward in sizes of q; out, dq, dk, dv are 4"


def bench_determinism(settings: Settings) -> Iterator[Row]:
    same = True
    for dtype, D in product(DTYPES, settings.head_dims):
        problem = settings.problem(settings.other_length, D, dtype, H=8, G=2)
        run = _ours(settings, problem, True)
        first, *others = [_with_threads(threads, run) for threads in (1, 1, 2, 2)]
        equal = all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))
        print(f"  {problem!s:44} gradients are {'the same' if equal else 'NOT the same'} bit for bit", flush=True)
        same &= equal
    yield "deterministic", same, "1: over runs and over one and two threads"


def _ours(settings: Settings, problem: Problem, backward: bool) -> Callable[[], Any]:
    return call(backend_attend(settings.backend, problem.window), problem.tensors(CPU), backward)


def _with_threads(threads: int, run: Callable[[], Any]) -> Any:
    torch.set_num_threads(threads)
    try:
        return run()
    finally:
        torch.set_num_threads(1)


def _line(problem: Problem, backward: bool, seconds: float, what: str) -> None:
    print(f"  {problem!s:44} {'fwd+bwd' if backward else 'fwd':8} {seconds * 1e3:10.2f} ms  {what}", flush=True)


BENCHES: dict[str, Callable[[Settings], Iterator[Row]]] = {
    "window": bench_window,
    "shapes": bench_shapes,
    "length": bench_length,
    "band": bench_band,
    "flex": bench_flex,
    "threads": bench_threads,
    "memory": bench_memory,
    "determinism": bench_determinism,
}
