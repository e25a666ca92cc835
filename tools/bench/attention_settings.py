"""Which sizes tools/bench_attention.py measures, and with what."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from bench.attention_problem import Attend, Problem
from bench.attention_rivals import block_forms
from bench.dtypes import DTYPES


@dataclass(frozen=True)
class Settings:
    """backend: ours. shrink divides every length, window, block and matrix; what is printed as a key keeps its name.
    png: where the chart of cost over length goes.
    """

    backend: str
    shrink: int = 1
    png: str | None = None
    rounds: int = 7
    window: int = 512
    H: int = 8
    head_dims: tuple[int, ...] = (64, 128)
    lengths: tuple[int, ...] = (4096, 8192, 16384, 32768)  # of the windowed problems
    curve: tuple[int, ...] = (1024, 2048, 4096, 8192, 16384, 32768, 65536)  # of cost over length
    sdpa_up_to: int = 32768
    all_heads_up_to: int = 4096  # where a call of SDPA takes less than a second or so
    mask_length: int = 8192  # of the sides that need an S x S mask
    other_length: int = 16384  # of other windows and heads, and of threads
    memory_length: int = 32768
    blocks: tuple[int, ...] = (64, 128, 256)
    gemm: int = 2048

    def problem(self, S: int, D: int, dtype: str, *, window: int | None = None, **changes: Any) -> Problem:
        heads = {"H": self.H, "G": changes.get("H", self.H)} | changes
        return Problem(S // self.shrink, D, dtype, (window or self.window) // self.shrink, **heads)

    def block_forms(self, problem: Problem) -> dict[str, Attend]:
        sizes = [block // self.shrink for block in self.blocks]
        return block_forms(problem.S, problem.window, DTYPES[problem.dtype], sizes)

    def mm(self, dtype: str, device: torch.device) -> tuple[Callable[[], object], float]:
        """A square product, and its operations: the peak that shares are of."""
        size = self.gemm // self.shrink
        a, b = torch.randn(2, size, size, device=device).to(DTYPES[dtype])
        return partial(torch.mm, a, b, out=torch.empty_like(a)), 2.0 * size**3


QUICK: dict[str, Any] = {
    "rounds": 2,
    "H": 2,
    "head_dims": (64,),
    "lengths": (4096,),
    "curve": (1024, 2048, 4096, 8192),
    "sdpa_up_to": 8192,
    "all_heads_up_to": 1024,
    "other_length": 4096,
    "memory_length": 8192,
    "blocks": (128,),
}
