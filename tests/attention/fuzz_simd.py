"""Random problems for the CPU kernel under AddressSanitizer and UndefinedBehaviorSanitizer. Not part of `make check`.

    python tests/attention/fuzz_simd.py                     # 10,000 problems, 15 minutes on one core
    python tests/attention/fuzz_simd.py --seed 7 --cases 500
    python tests/attention/fuzz_simd.py --seed 7 --only 123  # one of them again

Builds csrc/windowed_attention with both sanitizers (GCC) into a temporary folder, then starts a python in which that
build serves. Each problem has inputs of its own memory, without a byte to spare behind them; slices of the kernel's
workspace have gaps between them that must not be touched (workspace.hpp). Instruction sets take turns. Results are
compared with the float64 reference. Stops at the first problem that fails, and prints it.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import random
import subprocess
import sys
import sysconfig
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # the package of this checkout, wherever it is installed from
SOURCES = ROOT / "csrc" / "windowed_attention"
PROBLEM = "problem.txt"  # the one at work, beside the module
MODULE = "megazebra.attention._windowed_attention"
# vptr needs the types that pybind11 hides.
FLAGS = ["-std=c++17", "-O1", "-g1", "-fPIC", "-fvisibility=hidden", "-fno-omit-frame-pointer",
         "-fsanitize=address,undefined", "-fno-sanitize=vptr", "-fno-sanitize-recover=undefined"]  # fmt: skip


def build(folder: Path) -> Path:
    """The compiled module, made in `folder`."""
    import pybind11

    from megazebra.compiled import sources_digest

    compiler = os.environ.get("CXX", "g++")
    includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
    macro = f'-DSOURCES_DIGEST="{sources_digest("windowed_attention")}"'
    sources = sorted(SOURCES.glob("*.cpp"))
    objects = [folder / f"{source.stem}.o" for source in sources]
    runs = [subprocess.Popen([compiler, *FLAGS, *includes, macro, "-c", source, "-o", target])
            for source, target in zip(sources, objects, strict=True)]  # fmt: skip
    if sum(run.wait() for run in runs):
        sys.exit("the kernel doesn't compile with sanitizers")
    module = folder / f"_windowed_attention{sysconfig.get_config_var('EXT_SUFFIX')}"
    subprocess.run([compiler, *FLAGS, "-shared", *objects, "-o", module], check=True)
    return module


def start_sanitized(module: Path) -> int:
    """This program again, in a python that the sanitizers were loaded into first; its exit status."""
    # Its exceptions are torch's only if libstdc++ is there before AddressSanitizer looks for it.
    libraries = [
        subprocess.check_output(["g++", f"-print-file-name={name}"], text=True).strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    environment = os.environ | {
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    return subprocess.run([sys.executable, __file__, "--module", module, *sys.argv[1:]], env=environment).returncode


def load(module: str) -> None:
    """The build with sanitizers in place of the installed one."""
    specification = importlib.util.spec_from_file_location(MODULE, module)
    assert specification is not None
    assert specification.loader is not None
    sys.modules[MODULE] = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(sys.modules[MODULE])


@dataclass
class Problem:
    seed: str
    instruction_set: str
    dtype: torch.dtype
    B: int
    S: int
    T: int
    G: int
    R: int
    D: int
    window: int | None
    softcap: float | None
    sinks: bool
    documents: list[list[int]] | None  # of keys; the first have the T - S keys before the queries
    layouts: list[str]  # of q, k, v and dout
    q_factor: float


LAYOUTS = ["BSHD"] * 2 + ["BHSD", "SBHD", "gaps", "odd_address", "steps"]


def draw(seed: str, instruction_set: str) -> Problem:
    rng = random.Random(seed)
    long = rng.random() < 0.01  # beyond the kernel's chunks and panels
    S = rng.randint(1400, 3300) if long else rng.choice([rng.randint(1, 20), rng.randint(1, 200)])
    T = S + rng.choice([0, 0, rng.randint(1, 20), rng.randint(1, 2000 if long else 200)])
    B = rng.randint(1, 2)
    return Problem(
        seed, instruction_set, rng.choice([torch.float32, torch.bfloat16]), B, S, T,
        G=rng.randint(1, 1 if long else 3),
        R=rng.choice([1, 1, 2, 3, 4, 7]) if not long else rng.randint(1, 2),
        D=32 if long else rng.choice([32, 32, 48, 64, 80, 96, 112, 128, 144, 256]),
        window=rng.choice([None, rng.randint(1, min(T + 5, 20)), rng.randint(1, T + 5)]),
        softcap=rng.choice([None, None, rng.uniform(0.5, 80)]),
        sinks=rng.random() < 0.3,
        documents=[cut(rng, T) for _ in range(B)] if rng.random() < 0.4 else None,
        layouts=[rng.choice(LAYOUTS) for _ in range(4)],
        q_factor=rng.choice([1, 1, 1, 5, 30, 1000]),
    )  # fmt: skip


def cut(rng: random.Random, T: int) -> list[int]:
    """Lengths that add up to T: a few long documents, or many short ones."""
    most = rng.choice([3, 30, T])
    lengths: list[int] = []
    while (left := T - sum(lengths)) > 0:
        lengths.append(min(left, rng.randint(1, most)))
    return lengths


def queries_of(documents: list[int], before: int) -> list[int]:
    """How many queries each document has, where the first `before` keys of the row have none."""
    queries = []
    for keys in documents:
        without = min(keys, before)
        queries.append(keys - without)
        before -= without
    return queries


def place(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The same numbers in memory that ends with the last of them."""
    B, S, H, D = x.shape
    step = 2 if layout == "steps" else 1
    offset = 1 if layout == "odd_address" else 0
    gap = 5 if layout == "gaps" else 0
    row = step * D + gap
    strides = {"BHSD": (H * S * row, row, S * row), "SBHD": (H * row, B * H * row, row)}.get(
        layout, (S * (H * row + gap), H * row + gap, row)
    )
    extent = offset + 1 + sum((n - 1) * s for n, s in zip((B, S, H), strides, strict=True)) + (D - 1) * step
    memory = torch.full((extent,), torch.nan, dtype=x.dtype)
    return memory.as_strided(x.shape, (*strides, step), offset).copy_(x)


def solve(problem: Problem) -> None:
    """Raises AssertionError when the kernel is wrong."""
    # After `load`: all of these import the kernel.
    from test_attention_simd import check_against_float64

    from megazebra.attention import Packing, simd
    from megazebra.pattern import AttentionSpec

    p = problem
    generator = torch.Generator().manual_seed(random.Random(p.seed).getrandbits(32))

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(p.dtype)

    H = p.G * p.R
    shapes = [(p.B, p.S, H, p.D), (p.B, p.T, p.G, p.D), (p.B, p.T, p.G, p.D), (p.B, p.S, H, p.D)]
    numbers = [normal(*shape) for shape in shapes]
    numbers[0] *= p.q_factor
    sinks = 3 * normal(H) if p.sinks else None
    packing = None
    if p.documents is not None:
        packing = Packing.from_spans([queries_of(row, p.T - p.S) for row in p.documents], p.documents)
    spec = AttentionSpec(window=p.window, rope=None, sinks=p.sinks, softcap=p.softcap)  # type: ignore[arg-type]
    simd.instruction_sets = lambda: [p.instruction_set]
    inputs = [place(x, layout) for x, layout in zip(numbers, p.layouts, strict=True)]
    # Errors of few numbers do not average out.
    check_against_float64(inputs, spec, packing=packing, sinks=sinks, slack=3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="solve this one case only")
    parser.add_argument("--module", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.module is None:
        with tempfile.TemporaryDirectory() as folder:
            status = start_sanitized(build(Path(folder)))
            last = Path(folder) / PROBLEM
            if status != 0 and last.exists():
                print(f"failed: {last.read_text()}")
            sys.exit(status)

    load(arguments.module)
    from megazebra.attention import simd

    instruction_sets = simd.instruction_sets()
    assert simd._loaded is sys.modules[MODULE], simd._loaded
    torch.set_num_threads(1)
    start = time.monotonic()
    numbers = range(arguments.cases) if arguments.only is None else [arguments.only]
    for i in numbers:
        problem = draw(f"{arguments.seed}/{i}", instruction_sets[i % len(instruction_sets)])
        # Before it is solved, since a sanitizer ends the process.
        Path(arguments.module).with_name(PROBLEM).write_text(f"case {i}: {problem}\n")
        solve(problem)
        if (i + 1) % 500 == 0:
            print(f"{i + 1} problems in {time.monotonic() - start:.0f} s", flush=True)
    print(f"{len(numbers)} problems solved, {', '.join(instruction_sets)}")


if __name__ == "__main__":
    main()
