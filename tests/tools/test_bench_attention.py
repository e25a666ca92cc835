"""The bench counts what the mask lets through, compares with sides that compute the same, and gives its keys."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from bench import attention_cpu, attention_problem
from bench.attention_cpu import BENCHES
from bench.attention_problem import LARGEST_ERROR, Attend, Problem, backend_attend, check, largest_error, peak_over_q
from bench.attention_rivals import band_sdpa, block_forms, causal_sdpa, compiled_flex
from bench.attention_settings import Settings
from torch import Tensor

from megazebra.attention import load_backend
from megazebra.attention.reference import visible

TOOL = Path(__file__).parents[2] / "tools" / "bench_attention.py"
CPU = torch.device("cpu")
TINY = Settings("blocked", shrink=64, rounds=1, head_dims=(16,), H=2)


def heads_first(attend: Attend) -> Attend:
    """A rival that takes and returns [B, S, heads, D]."""
    return lambda *qkv: attend(*(x.transpose(1, 2) for x in qkv)).transpose(1, 2)


@pytest.mark.parametrize("window", [1, 7, 50, 80])
def test_operations_by_counting(window: int) -> None:
    problem = Problem(S=50, D=16, dtype="fp32", window=window, H=4, G=2)
    pairs = int(visible(50, 50, window, None, CPU).sum())
    # Scores and weighted values; backward: scores again, dv, dp, dq, dk. A product of D numbers is 2 D operations.
    assert problem.flops(backward=False) == pairs * 4 * 2 * (2 * 16)
    assert problem.flops(backward=True) == pairs * 4 * 7 * (2 * 16)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("groups", [4, 2])
def test_torch_sides_compute_the_same(dtype: str, groups: int) -> None:
    problem = Problem(S=96, D=16, dtype=dtype, window=16, H=4, G=groups)
    forms = block_forms(96, 16, getattr(torch, {"fp32": "float32", "bf16": "bfloat16"}[dtype]), (4, 8, 16, 32))
    assert len(forms) == 2 * 2 * 3, "SDPA and products, views and copies, blocks that divide the window"
    for name, attend in (forms | {"band": band_sdpa(96, 16)}).items():
        assert largest_error(heads_first(attend), problem, CPU) < LARGEST_ERROR[dtype], name
    whole = replace(problem, window=96)
    assert largest_error(heads_first(causal_sdpa), whole, CPU) < LARGEST_ERROR[dtype]


@pytest.mark.filterwarnings("ignore:.*flex_attention.*without torch.compile")
def test_flex_side_computes_the_same_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # minutes in a test are too many
    q, k, v, _ = Problem(S=96, D=16, dtype="fp32", window=16).tensors(CPU)
    expected = backend_attend("reference", 16)(q, k, v)
    torch.testing.assert_close(heads_first(compiled_flex(96, 16))(q, k, v), expected, rtol=0, atol=1e-5)


def test_a_wrong_backend_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem(S=4096, D=16, dtype="fp32", window=32)
    assert check("blocked", problem, CPU) is None
    right = load_backend("blocked")

    def one_key_more(q: Tensor, k: Tensor, v: Tensor, *, spec: object) -> Tensor:
        return right.attend(q, k, v, spec=replace(spec, window=33))  # type: ignore[type-var]

    wrong = SimpleNamespace(unavailable=right.unavailable, unsupported=right.unsupported, attend=one_key_more)
    monkeypatch.setattr(attention_problem, "load_backend", lambda name: wrong)
    assert "it is wrong" in (check("blocked", problem, CPU) or "")


def test_a_backend_that_cannot_run_here_is_refused() -> None:
    assert "CUDA" in (check("flash", Problem(S=4096, D=16, dtype="bf16", window=32), CPU) or "")


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux counts peaks there")
def test_memory_counts_results_and_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    real = attention_problem.backend_attend

    def peak(extra: int) -> float:
        """With `extra` sizes of q as a workspace."""

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            workspace = torch.ones(extra * q.numel())
            return real("blocked", 64)(q, k, v) + 0 * workspace[0]

        monkeypatch.setattr(attention_problem, "backend_attend", lambda *_: attend)
        return peak_over_q("blocked", Problem(S=8192, D=64, dtype="fp32", window=64, H=4, G=4))

    small, large = peak(1), peak(30)  # far above the peak of backward
    assert small > 3.5, "out, dq, dk and dv"
    assert large > small + 15
    assert large < small + 35


@pytest.mark.filterwarnings("ignore:.*flex_attention.*without torch.compile")
def test_keys_others_rely_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The full bench with everything 64 times smaller."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(attention_cpu, "in_fresh_process", lambda function, *arguments: function(*arguments))
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    settings = replace(TINY, png=str(tmp_path / "cost.png"))
    numbers = {key: number for bench in BENCHES.values() for key, number, _ in bench(settings)}
    passes = [f"{dtype}_{name}" for dtype in ("fp32", "bf16") for name in ("fwd", "fwdbwd")]
    wanted = {f"{key}_{which}" for key in ("share_of_mm", "vs_blocks") for which in passes}
    for dtype in ("fp32", "bf16"):
        wanted |= {f"vs_sdpa_{dtype}_{length}" for length in ("1k", "1k_fwd", "8k", "32k")}
        wanted |= {f"vs_band_{dtype}_8k", f"vs_flex_{dtype}_fwd", f"memory_over_q_{dtype}"}
    wanted |= {"threads_2_over_1", "time_exponent", "deterministic"}
    assert wanted <= set(numbers)
    shapes = ("w128", "w2048", "gqa", "peaked")
    others = {f"{key}_{shape}_{which}" for key in ("share_of_mm", "vs_blocks") for shape in shapes for which in passes}
    assert set(numbers) - wanted - others == {f"vs_sdpa_{d}_{k}k" for d in ("fp32", "bf16") for k in (2, 4, 16)}
    assert numbers["deterministic"] == 1
    assert all(number > 0 for number in numbers.values())
    assert (tmp_path / "cost.png").read_bytes().startswith(b"\x89PNG")


def test_the_program(tmp_path: Path) -> None:
    target = tmp_path / "numbers.json"
    tool = [sys.executable, str(TOOL), "--quick", "--shrink", "64"]
    options = ["--only", "band", "--backend", "blocked", "--json", str(target)]
    output = subprocess.run([*tool, *options], check=True, capture_output=True, text=True).stdout
    assert "MALLOC_MMAP_MAX_=0" in output, "it started itself again with the allocator tuned"
    assert "attention backend blocked: asked for by name" in output
    assert set(json.loads(target.read_text())) == {"vs_band_fp32_8k", "vs_band_bf16_8k"}
