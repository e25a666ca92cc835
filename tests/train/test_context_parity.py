"""Context-parallel training is training: losses, gradient norms and parameters of a plain single-process loop.

The yardstick is that of test_parity.py: how far a plain float32 run strays from a float64 one. The whole matrix:
python -m pytest -m slow tests/train/test_context_parity.py
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import pytest
from support.distributed import run_distributed
from support.training import Trajectory, distance, tiny_config, train_plainly, train_under_deepspeed
from torch import float64

from megazebra.config.schema import Config

OPTIMIZERS = {"sgd": 0.5, "adamw": 0.01}
STAGES = (0, 1, 2, 3)
PATTERNS = ("GLLL", "LLLG", "LLLL", "GGGG")
# Of 32 tokens, a rank of 2 holds 16 and one of 4 holds 8: windows less than a shard, a shard and the own key, several.
WINDOWS = (5, 9, 17, 30)
TIMES_THE_NOISE = 6

Case = tuple[int, str, bool, str, int]  # ZeRO stage, pattern, document mask, optimizer, window
Layout = tuple[int, int, int]  # cp, tp (with sequence parallelism), dp
EVERY_CASE = [
    # The windows in turns: another one whenever only one of the others changes.
    (stage, pattern, packed, optimizer, WINDOWS[(stage + i + 2 * packed + 3 * (optimizer == "sgd")) % 4])
    for stage, (i, pattern), packed, optimizer in itertools.product(
        STAGES, enumerate(PATTERNS), (True, False), OPTIMIZERS
    )
]
LAYOUTS = [(2, 1, 1), (2, 1, 2), (4, 1, 1), (2, 2, 1), (4, 2, 1)]


def layout_name(layout: Layout) -> str:
    return "cp{}-tp{}-dp{}".format(*layout)


def some_cases(number: int) -> list[Case]:
    """Every stage once, the other choices in turns; over the layouts every stage meets every pattern."""
    return [
        (stage, PATTERNS[(stage + number) % 4], (stage + number) % 3 != 0, ("sgd", "adamw")[(stage // 2 + number) % 2],
         WINDOWS[(2 * stage + number) % 4])
        for stage in STAGES
    ]  # fmt: skip


def config_for(case: Case, layout: Layout = (1, 1, 1), **more: Any) -> Config:
    stage, pattern, packed, optimizer, window = case
    cp, tp, dp = layout
    return tiny_config(
        model__pattern=pattern,
        model__window=window,
        data__document_mask=packed,
        optimizer__name=optimizer,
        optimizer__lr=OPTIMIZERS[optimizer],
        parallel__zero_stage=stage,
        parallel__context=cp,
        parallel__tensor=tp,
        parallel__sequence_parallel=tp > 1,
        train__steps=6,
        train__micro_batch_size=2 // dp,
        **more,
    )


@functools.cache
def truth(case: Case, **more: Any) -> Trajectory:
    return train_plainly(config_for(case, **more), float64)


@functools.cache
def noise(optimizer: str) -> tuple[float, ...]:
    """The furthest of some plain runs: how far one run strays is luck, by a factor of ten."""
    cases = [(0, pattern, packed, optimizer, WINDOWS[0]) for pattern in PATTERNS for packed in (True, False)]
    distances = [distance(train_plainly(config_for(case)), truth(case)) for case in cases]
    return tuple(map(max, zip(*distances, strict=True)))


def check(layout: Layout, cases: Sequence[Case], **more: Any) -> None:
    cp, tp, dp = layout
    configs = [config_for(case, layout, **more) for case in cases]
    for rank in run_distributed(train_under_deepspeed, cp * tp * dp, configs, timeout=3600):
        for case, run in zip(cases, rank, strict=True):
            plain = truth((0, *case[1:]), **more)
            for what, found, limit in zip(
                ("loss", "gradient norm", "parameter"), distance(run, plain), noise(case[3]), strict=True
            ):
                assert found <= TIMES_THE_NOISE * limit, (
                    f"{layout} {case}: {what} off by {found:.2e}, noise {limit:.2e}"
                )


@pytest.mark.parametrize("layout", LAYOUTS[:-1], ids=layout_name)
def test_trains_like_the_plain_loop(layout: Layout) -> None:
    check(layout, some_cases(LAYOUTS.index(layout)))


@pytest.mark.parametrize(("recompute", "layout"), [("selective", (2, 1, 1)), ("full", (2, 2, 1))])
def test_recomputation_and_padding(recompute: str, layout: Layout) -> None:
    """29 tokens fit no layout: they are padded to 30 or 32."""
    cases = [(1, "GLLL", True, "sgd", 5), (3, "LLLG", False, "sgd", 17)]
    check(layout, cases, train__recompute=recompute, data__seq_len=29)


@pytest.mark.parametrize("strategy", ["allgather", "ulysses"])
def test_strategies_that_were_asked_for(strategy: str) -> None:
    cases = [(2, "GLLL", True, "sgd", 9)]
    check((4, 1, 1), cases, parallel__context_local=strategy, parallel__context_global=strategy)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("layout", [(1, 2, 1), *LAYOUTS], ids=layout_name)
def test_every_case(layout: Layout) -> None:
    for first in range(0, len(EVERY_CASE), 8):  # every engine leaves threads of its groups behind
        check(layout, EVERY_CASE[first : first + 8])
