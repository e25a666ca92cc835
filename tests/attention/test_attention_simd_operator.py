"""The CPU kernel as an operator of torch: what it accepts, saves and allocates, and what serves in its place."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from attention_cases import CPU, Case, attention_spec
from torch import Tensor

from megazebra.attention import Packing, simd

compiled = pytest.mark.skipif(not simd.instruction_sets(), reason="not compiled")
CASE = Case(9, S=40, T=50, H=4, G=2, D=48)
DTYPES = [torch.float32, torch.bfloat16]


def out_and_gradients(inputs: list[Tensor], dout: Tensor | None = None) -> list[Tensor]:
    """`inputs` may be views; the gradients are theirs."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = simd.attend(*leaves[:3], spec=CASE.spec)
    return [out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out) if dout is None else dout)]


def padded(x: Tensor, before: int, step: int = 1) -> Tensor:
    """The same numbers, every `step`-th one from `before` on of other memory."""
    memory = torch.full((before + step * x.numel(),), torch.nan, dtype=x.dtype)
    view = memory.as_strided(x.shape, [step * s for s in x.stride()], before)
    return view.copy_(x)


def rows_of_something_larger(x: Tensor) -> Tensor:
    B, S, H, D = x.shape
    memory = torch.full((B, S, 2 * H + 1, D + 16), torch.nan, dtype=x.dtype)
    return memory[:, :, 1 : 2 * H : 2, 3 : 3 + D].copy_(x)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "heads_before_positions": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "positions_before_rows": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "rows_of_something_larger": rows_of_something_larger,
    "odd_address": lambda x: padded(x, 1),
    "steps_in_the_head_dimension": lambda x: padded(x, 0, step=2),
    "head_dimension_first": lambda x: x.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0),
}


@compiled
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides_and_addresses_give_the_same_bits(layout: str, dtype: torch.dtype) -> None:
    leaves, dout = Case(9, B=2, S=40, T=50, D=48).tensors(dtype)
    inputs = [x.detach() for x in leaves]
    changed = [LAYOUTS[layout](x) for x in inputs]
    for a, b in zip(changed, inputs, strict=True):
        assert a.stride() != b.stride() or a.data_ptr() % 64 != b.data_ptr() % 64
    plain = out_and_gradients(inputs, dout)
    assert all(map(torch.equal, plain, out_and_gradients(changed, LAYOUTS[layout](dout))))


@compiled
def test_expanded_inputs_and_gradients() -> None:
    (q, k, v), _ = CASE.tensors(torch.float32)
    q, k, v = q.detach().expand(3, -1, -1, -1), k.detach()[:, :, :1].expand(3, -1, 2, -1), v.detach()[:, :1]
    inputs = [q, k, v.expand(3, 50, -1, -1)]
    plain = out_and_gradients([x.contiguous() for x in inputs])
    assert all(map(torch.equal, plain, out_and_gradients(inputs, torch.ones(()).expand(q.shape))))


@compiled
@pytest.mark.parametrize("wanted", ["q", "k", "v", "sinks"])
def test_gradients_of_some_inputs_only(wanted: str) -> None:
    case = Case(9, S=40, sinks=True)
    leaves, dout = case.tensors(torch.float32)
    i = ["q", "k", "v", "sinks"].index(wanted)
    out = simd.attend(*leaves[:3], spec=case.spec, sinks_H=leaves[3])
    expected = torch.autograd.grad(out, leaves, dout)[i]
    some = [x.detach().requires_grad_(j == i) for j, x in enumerate(leaves)]
    simd.attend(*some[:3], spec=case.spec, sinks_H=some[3]).backward(dout)
    assert torch.equal(some[i].grad, expected)
    assert all(x.grad is None for x in some if x is not some[i])


@compiled
def test_without_gradients() -> None:
    (q, k, v), _ = CASE.tensors(torch.float32)
    out = simd.attend(q, k, v, spec=CASE.spec)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            plain = simd.attend(q, k, v, spec=CASE.spec)
        assert not plain.requires_grad
        assert torch.equal(plain, out)


@compiled
def test_backward_of_backward_is_refused() -> None:
    leaves, dout = CASE.tensors(torch.float32)
    out = simd.attend(*leaves, spec=CASE.spec)
    dq = torch.autograd.grad(out, leaves, dout.requires_grad_(), create_graph=True)[0]
    with pytest.raises(RuntimeError, match=r"megazebra.*windowed_attention_backward"):
        dq.sum().backward()


@compiled
def test_autocast_does_not_lower_the_precision() -> None:
    (q, k, v), _ = CASE.tensors(torch.float32)
    plain = simd.attend(q, k, v, spec=CASE.spec)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(simd.attend(q, k, v, spec=CASE.spec), plain)


@compiled
@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16], ids=str)
def test_default_dtype_and_device_do_not_matter(default: torch.dtype) -> None:
    case = Case(9, S=40, sinks=True)
    leaves, dout = case.tensors(torch.float32)

    def gradients() -> tuple[Tensor, ...]:
        out = simd.attend(*leaves[:3], spec=case.spec, sinks_H=leaves[3])
        return torch.autograd.grad(out, leaves, dout)

    plain = gradients()
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        with torch.device("meta"):
            again = gradients()
    finally:
        torch.set_default_dtype(before)
    assert all(map(torch.equal, plain, again))


OPTIONS = {
    "plain": Case(9, S=40, T=50),
    "all": Case(9, S=40, B=2, documents=[[10, 30], [40]], sinks=True, softcap=3.0),
    "global": Case(None, S=40, H=2, G=1),
}


def operator_arguments(
    case: Case, dtype: torch.dtype
) -> tuple[list[Tensor | None], Tensor, tuple[int | None, float | None]]:
    leaves, dout = case.tensors(dtype)
    packing = case.packing()
    document_start = None if packing is None else packing.document_start_BS
    tensors = [*leaves[:3], document_start, leaves[3] if case.sinks else None]
    return tensors, dout, (case.window, case.softcap)


@compiled
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS)
def test_operators_keep_what_torch_asks_of_them(options: str, dtype: torch.dtype) -> None:
    (q, k, v, document_start, sinks), dout, numbers = operator_arguments(OPTIONS[options], dtype)
    torch.library.opcheck(simd.windowed_attention, (q, k, v, document_start, sinks, *numbers))
    q, k, v, sinks = (None if x is None else x.detach() for x in (q, k, v, sinks))
    out, lse = simd.windowed_attention(q, k, v, document_start, sinks, *numbers)
    arguments = (dout, q, k, v, out, lse, document_start, sinks, *numbers)
    torch.library.opcheck(simd.windowed_attention_backward, arguments)


@compiled
@pytest.mark.parametrize("options", OPTIONS)
def test_compiled_whole_it_gives_the_same_bits(options: str) -> None:
    case = OPTIONS[options]
    leaves, dout = case.tensors(torch.float32)
    packing = case.packing()

    def step(*leaves: Tensor) -> Tensor:
        sinks = leaves[3] if case.sinks else None
        return simd.attend(2 * leaves[0], *leaves[1:3], spec=case.spec, packing=packing, sinks_H=sinks) + 1

    plain = torch.autograd.grad(step(*leaves), leaves, dout)
    torch._dynamo.reset()
    graph = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(graph(*leaves), step(*leaves))
    assert all(map(torch.equal, plain, torch.autograd.grad(graph(*leaves), leaves, dout)))


def allocated(function: Callable[[], object]) -> list[int]:
    """Bytes of each piece of memory that torch hands out meanwhile."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    events = profile.profiler.kineto_results.events()
    return sorted(event.nbytes() for event in events if event.name() == "[memory]" and event.nbytes() > 0)


@compiled
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_torch_allocates_the_results_only(dtype: torch.dtype) -> None:
    case = Case(64, S=1024, B=2, H=4, G=2, strided=True)
    leaves, dout = case.tensors(dtype)
    statistics = 4 * case.B * case.S * case.H
    query_bytes, key_bytes = leaves[0].nbytes, leaves[1].nbytes
    kept: list[Tensor] = []
    forward = allocated(lambda: kept.extend([simd.attend(*leaves, spec=case.spec)]))
    assert forward == sorted([query_bytes, statistics])
    # Backward also sums dout * out of each row; a zero gradient of the log-sum-exp may come from autograd.
    backward = allocated(lambda: torch.autograd.grad(kept[0], leaves, dout))
    assert backward[-3:] == sorted([query_bytes, key_bytes, key_bytes])
    assert sum(backward[:-3]) <= 2 * statistics


@compiled
def test_only_inputs_output_and_row_sums_are_saved() -> None:
    case = Case(64, S=1024, sinks=True, documents=[[1000, 24]])
    leaves, _ = case.tensors(torch.float32)
    packing = case.packing()
    assert packing is not None
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        out = simd.attend(*leaves[:3], spec=case.spec, packing=packing, sinks_H=leaves[3])
    own = {x.data_ptr() for x in (*leaves, out, packing.document_start_BS)}
    assert [x.shape for x in saved if x.data_ptr() not in own] == [(case.B, case.S, case.H)]


@pytest.mark.parametrize(
    ("head_dim", "dtype", "why"),
    [
        (64, torch.float16, "float32 or bfloat16, the dtype is torch.float16"),
        (64, torch.float64, "float32 or bfloat16, the dtype is torch.float64"),
        (40, torch.float32, "a multiple of 16 from 32 to 256, got 40"),
        (16, torch.float32, "a multiple of 16 from 32 to 256, got 16"),
        (272, torch.float32, "a multiple of 16 from 32 to 256, got 272"),
    ],
)
@compiled
def test_what_it_cannot_compute_is_refused(head_dim: int, dtype: torch.dtype, why: str) -> None:
    spec = attention_spec(4)
    assert why in str(simd.unsupported(spec, head_dim=head_dim, dtype=dtype, device=CPU))
    x = torch.zeros(1, 8, 2, head_dim, dtype=dtype)
    with pytest.raises(ValueError, match=f"backend 'simd' can't compute this.*{why}.*use 'blocked'"):
        simd.attend(x, x, x, spec=spec)


def test_it_runs_on_the_cpu_only() -> None:
    assert "the device is cuda" in str(simd.unavailable(torch.device("cuda")))


@compiled
def test_documents_may_be_of_any_integer_type_and_layout() -> None:
    packing = Packing.from_document_lengths([[10, 30], [25, 15]])
    (q, k, v), _ = Case(9, S=40, B=2).tensors(torch.float32)
    start = packing.document_start_BS
    plain = simd.windowed_attention(q, k, v, start, None, 9, None)[0]
    for other in (start.int(), start.t().contiguous().t()):
        assert torch.equal(simd.windowed_attention(q, k, v, other, None, 9, None)[0], plain)


TURNED_OFF = """
import torch
from megazebra.attention import resolve_backend, simd
from megazebra.pattern import AttentionSpec

specs = [AttentionSpec(window=8, rope=None, sinks=False, softcap=None)]
cpu = torch.device("cpu")
print(simd.unavailable(cpu))
print(resolve_backend("auto", specs, head_dim=64, dtype=torch.float32, device=cpu).reason)
for refused in (lambda: resolve_backend("simd", specs, head_dim=64, dtype=torch.float32, device=cpu),
                lambda: simd.attend(*[torch.zeros(1, 8, 2, 64)] * 3, spec=specs[0])):
    try:
        refused()
    except ValueError as error:
        print(error)
print(simd.instruction_sets())
"""


def test_turned_off_it_says_so_and_blocked_serves() -> None:
    environment = os.environ | {"MEGAZEBRA_SIMD": "off"}
    result = subprocess.run(
        [sys.executable, "-c", TURNED_OFF], env=environment, capture_output=True, text=True, check=True
    )
    unavailable, auto, by_name, attend, instruction_sets = result.stdout.splitlines()
    assert unavailable == "it is not compiled (turned off by MEGAZEBRA_SIMD=off)"
    assert auto == f"attention backend blocked: not simd, because {unavailable}"
    assert by_name == f"attention backend 'simd' was asked for but {unavailable}; mend that or use 'auto'"
    assert attend == f"attention backend 'simd' can't compute this: {unavailable}; use 'blocked'"
    assert instruction_sets == "[]"
