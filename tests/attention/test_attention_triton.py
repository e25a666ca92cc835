"""The Triton backend without a GPU: its kernels in Triton's interpreter, and compiled for GPUs that aren't here.

The full table of block sizes: python -m pytest -m slow tests/attention/test_attention_triton.py
"""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from attention_cases import CPU, attention_spec

from megazebra.attention import Packing, triton
from megazebra.attention.triton_blocks import choose_blocks

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="the package triton is not here")
CUDA = torch.device("cuda")
KERNELS = ("forward", "query_gradient", "key_gradient")
# Shared memory of one program, KiB (CUDA C++ programming guide, technical specifications per compute capability).
SHARED_KIB = {(8, 0): 163, (8, 6): 99, (8, 9): 99, (9, 0): 227, (10, 0): 227, (12, 0): 99}


@needs_triton
def test_the_kernels_in_tritons_interpreter():
    """In a process of its own: Triton decides when it is imported whether it interprets."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "triton_in_interpreter.py"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    folder = Path(__file__).parent
    run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=280)
    assert run.returncode == 0, run.stdout + run.stderr


def test_reasons_why_not(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "need a CUDA GPU, the device is cpu" in triton.unavailable(CPU)
    q = torch.zeros(1, 4, 2, 64)
    with pytest.raises(ValueError, match="'triton' needs CUDA tensors, got cpu; use 'blocked'"):
        triton.attend(q, q, q, spec=attention_spec(8))

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "8.0 or newer, the GPU has 7.5" in triton.unavailable(CUDA)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setitem(sys.modules, "megazebra.attention.triton_kernels", None)
    assert "is not installed (" in triton.unavailable(CUDA)
    monkeypatch.setattr(triton, "_kernels", lambda: triton.knobs)
    assert "broken or too old (AttributeError: " in triton.unavailable(CUDA)
    monkeypatch.setattr(triton, "_kernels", lambda: None)
    assert triton.unavailable(CUDA) is None


def test_offsets_beyond_32_bits_are_avoided():
    """A million positions of 32 heads with head dim 128: fine as [B, S, H, D], not as a view of [B, H, S, D]."""
    q = torch.empty(1, 2**20, 32, 128, device="meta")
    assert triton._with_dense_rows(q)[0] is q
    view = torch.empty(1, 32, 2**20, 128, device="meta").transpose(1, 2)
    (copy,) = triton._with_dense_rows(view)
    assert copy.is_contiguous()


def test_what_it_does_not_compute_is_said():
    def refusal(head_dim: int = 64, dtype: torch.dtype = torch.bfloat16) -> str | None:
        return triton.unsupported(attention_spec(8), head_dim=head_dim, dtype=dtype, device=CUDA)

    assert refusal() is None
    assert "the dtype is torch.float64" in refusal(dtype=torch.float64)
    assert "head_dim 32, 64, 80, 96, 128, 256, got 72" in refusal(head_dim=72)


@pytest.mark.parametrize("capability", SHARED_KIB, ids=str)
@pytest.mark.parametrize("dtype", triton.DTYPES, ids=str)
def test_there_are_blocks_for_all_that_is_supported(capability: tuple[int, int], dtype: torch.dtype):
    for head_dim in triton.HEAD_DIMS:
        for kernel in KERNELS:
            blocks = choose_blocks(kernel, capability, triton._padded(head_dim), dtype.itemsize)
            # Triton multiplies blocks of 16 or more, and arrays whose size is a power of two.
            assert all(size >= 16 and size & (size - 1) == 0 for size in (blocks.rows, blocks.keys))
            assert blocks.warps in (4, 8)


def recorded_launches(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], head_dim: int) -> dict[str, tuple]:
    """(kernel, arguments, options) of every kernel of a layer with all options, as they are launched on that GPU."""
    from megazebra.attention import triton_kernels

    launches: dict[str, tuple] = {}

    class Recorder:
        def __init__(self, name: str) -> None:
            self.name, self.kernel = name, getattr(triton_kernels, f"{name}_kernel")

        def __getitem__(self, grid: tuple[int, int]):
            def launch(*arguments: Any, **named: Any) -> None:
                options = {key: named.pop(key) for key in set(named) - set(self.kernel.arg_names)}
                bound = dict(zip(self.kernel.arg_names, arguments, strict=False)) | named
                launches[self.name] = (self.kernel, bound, options)

            return launch

    recorders = {f"{name}_kernel": Recorder(name) for name in (*KERNELS, "delta")}
    stand_in = SimpleNamespace(**recorders, dot_dtype=triton_kernels.dot_dtype)
    q, k = (torch.zeros(1, 64, heads, head_dim, dtype=torch.bfloat16, requires_grad=True) for heads in (4, 2))
    sinks, packing = torch.zeros(4, requires_grad=True), Packing.from_document_lengths([[32, 32]])
    with monkeypatch.context() as patch:
        patch.setattr(triton, "_kernels", lambda: stand_in)
        patch.setattr(triton, "_interpreted", lambda: True)
        patch.setattr(triton, "_capability", lambda device: capability)
        spec = attention_spec(512, sinks=True, softcap=20.0)
        triton.attend(q, k, k, spec=spec, packing=packing, sinks_H=sinks).sum().backward()
    return launches


POINTERS = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int64: "*i64", torch.int32: "*i32"}


def compiled(kernel: Any, bound: dict[str, Any], options: dict[str, Any], capability: tuple[int, int]) -> Any:
    """The kernel compiled as a launch with these arguments compiles it."""
    import triton as compiler
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes = {}, {}, {}
    for index, (name, parameter) in enumerate(zip(kernel.arg_names, kernel.params, strict=True)):
        value = bound[name]
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = POINTERS[value.dtype] if isinstance(value, torch.Tensor) else "i32"
            if isinstance(value, torch.Tensor) or value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    return compiler.compile(source, target=GPUTarget("cuda", 10 * capability[0] + capability[1], 32), options=options)


def stack_bytes(cubin: bytes, folder: Path) -> int:
    """Memory of each thread that stands in for registers it lacks."""
    from triton import knobs

    (folder / "kernel.cubin").write_bytes(cubin)
    command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", "kernel.cubin"]
    usage = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout
    return int(re.search(r"STACK:(\d+)", usage).group(1))


def check_compiled(
    capability: tuple[int, int], head_dim: int, kernels: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(folder))
    launches = recorded_launches(monkeypatch, capability, head_dim)
    for name in kernels:
        binary = compiled(*launches[name], capability)
        assert binary.metadata.shared <= SHARED_KIB[capability] * 1024, name
        assert stack_bytes(binary.asm["cubin"], folder) == 0, name


@needs_triton
@pytest.mark.parametrize(
    ("capability", "head_dim", "kernels"),
    [
        ((8, 0), 64, ("forward",)),
        ((9, 0), 128, ("key_gradient", "delta")),
        ((10, 0), 64, ("query_gradient",)),
    ],
    ids=str,
)
def test_compiles_for_gpus_without_spills(capability, head_dim, kernels, monkeypatch: pytest.MonkeyPatch, tmp_path):
    check_compiled(capability, head_dim, kernels, monkeypatch, tmp_path)


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("head_dim", triton.HEAD_DIMS)
@pytest.mark.parametrize("capability", SHARED_KIB, ids=str)
def test_every_kernel_compiles_without_spills(capability, head_dim, monkeypatch: pytest.MonkeyPatch, tmp_path):
    check_compiled(capability, head_dim, (*KERNELS, "delta"), monkeypatch, tmp_path)
