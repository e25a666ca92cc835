"""The Triton kernels in Triton's interpreter: run by test_attention_triton.py in a process of its own.

By hand: TRITON_INTERPRET=1 python -m pytest tests/attention/triton_in_interpreter.py
"""

import dataclasses

import pytest
import torch
from attention_cases import CASES, CPU, Case, error, forward_and_gradients

from megazebra.attention import reference, triton, triton_kernels
from megazebra.attention.triton_blocks import choose_blocks

# As in test_attention_backends.py: rounding errors of about 2^-24 each in float32.
TOLERANCE, LOGIT_TOLERANCE = 2e-6, 5e-5
# 16-bit results are computed in float32 here and rounded once; fp16 to nearest, bf16 towards zero by the interpreter,
# which is an error of up to 2^-7 (2^-8 / sqrt(3) * 1.4 in the mean). Gradients also see the rounded output.
HALF_TOLERANCE = {torch.float16: 5e-4, torch.bfloat16: 6e-3}
NAMES = ("out", "dq", "dk", "dv", "dsinks")

# Two query heads of one key/value head, because the interpreter takes a millisecond for an operation.
FEW_HEADS = {case.name: dataclasses.replace(case, H=2, G=1) for case in CASES}
CHOSEN = [
    FEW_HEADS[name]
    for name in (
        "window1",
        "window_S-1",
        "global",
        "one_token",
        "decode_local",
        "halo",
        "keys_before_window_beyond",
        "documents_local",
        "documents_in_halo",
        "documents_left_of_queries",
        "softcap_local",
        "sinks_global",
        "everything",
        "large_logits_sinks",
        "strided",
    )
] + [
    Case(9, S=61, H=3, G=1, name="three_heads_share_keys"),
    Case(None, S=40, H=8, G=1, documents=[[1, 22, 17]], name="eight_heads_share_keys"),
    Case(9, S=40, H=2, G=1, D=80, name="D80"),
    Case(9, S=40, H=2, G=1, D=96, name="D96"),
    Case(9, S=40, H=2, G=2, D=256, name="D256"),
]


def compare(case: Case, dtype: torch.dtype, tolerance: float) -> None:
    expected = forward_and_gradients("reference", case, torch.float64, rounded_to=dtype)
    actual = forward_and_gradients("triton", case, dtype, rounded_to=dtype)
    assert all(x.dtype == dtype for x in actual)
    # With a window of one, dq and dk are zero up to rounding: measure those against dv.
    floor = expected[3].double().norm() * 0.5
    for name, a, b in zip(NAMES, actual, expected, strict=False):
        assert a.shape == b.shape, name
        assert error(a, b, floor) < tolerance, f"{name}: {error(a, b, floor):.2e}"


@pytest.mark.parametrize("case", CHOSEN, ids=str)
def test_float32_equals_the_float64_reference(case: Case):
    compare(case, torch.float32, LOGIT_TOLERANCE if case.q_factor > 1 else TOLERANCE)


@pytest.mark.parametrize("dtype", HALF_TOLERANCE, ids=str)
def test_half_precision_is_rounded_once(dtype: torch.dtype):
    compare(Case(20, S=50, T=60, sinks=True, softcap=5.0, name="half"), dtype, HALF_TOLERANCE[dtype])


def test_rows_of_any_stride():
    """A head dim that isn't dense, and the gradient of a sum, all of whose strides are 0."""
    case = Case(9, S=30)
    leaves, _ = case.tensors(torch.float32)
    (q, k, v), gradients = leaves, []
    for backend, dtype in ((triton, torch.float32), (reference, torch.float64)):
        q_apart = q.detach().to(dtype).repeat_interleave(2, dim=-1)[..., ::2].requires_grad_()
        assert q_apart.stride(-1) == 2
        out = backend.attend(q_apart, k.to(dtype), v.to(dtype), spec=case.spec)
        gradients.append(torch.autograd.grad(out.sum(), q_apart)[0])
    assert error(*gradients, gradients[1].norm()) < TOLERANCE * 10  # the gradient of a sum is small: sum(dweights) = 0


def test_results_are_the_same_bit_for_bit():
    case = Case(20, S=50, H=4, G=2, documents=[[30, 20]])
    first, second = (forward_and_gradients("triton", case, torch.float32, rounded_to=torch.float32) for _ in range(2))
    assert all(map(torch.equal, first, second))


SMALL = Case(8, S=10, T=12, H=2, G=1, sinks=True, softcap=5.0, spans=([[4, 6]], [[6, 6]]))


def operator_arguments() -> tuple:
    leaves, _ = SMALL.tensors(torch.float32)
    return (*leaves, SMALL.packing().document_start_BS, SMALL.window, SMALL.softcap)


def test_operators_keep_torchs_rules():
    arguments = operator_arguments()
    torch.library.opcheck(triton._forward, arguments)
    q, k, v, _, *rest = (x.detach() if isinstance(x, torch.Tensor) else x for x in arguments)
    out, lse = triton._forward(*(x.detach() if isinstance(x, torch.Tensor) else x for x in arguments))
    torch.library.opcheck(triton._backward, (torch.randn_like(out), q, k, v, out, lse, *rest))


def test_a_second_backward_is_refused():
    out, lse = triton._forward(*operator_arguments())
    assert not lse.requires_grad, "no gradient of the log-sum-exp is computed"
    leaves, dout = SMALL.tensors(torch.float32)
    out = triton.attend(*leaves[:3], spec=SMALL.spec, packing=SMALL.packing(), sinks_H=leaves[3])
    for gradient in torch.autograd.grad(out, leaves, dout, create_graph=True):
        with pytest.raises(RuntimeError, match="no autograd formula was registered"):
            gradient.sum().backward(retain_graph=True)


def test_compiles_without_a_graph_break():
    leaves, dout = SMALL.tensors(torch.float32)
    packing = SMALL.packing()

    def layer(q, k, v, sinks):
        return triton.attend(q * 2, k, v, spec=SMALL.spec, packing=packing, sinks_H=sinks).sin()

    plain = layer(*leaves)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)(*leaves)
    assert torch.equal(plain, compiled)
    gradients = (torch.autograd.grad(x, leaves, dout) for x in (plain, compiled))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def expected_blocks(case: Case, kernel: str) -> tuple[int, int]:
    """How many blocks the loops should visit, and how many of those without a mask, counted on the mask itself.

    For every block that a program keeps: what any of its rows (or keys) sees, cut into blocks from the left.
    """
    blocks, R = choose_blocks(kernel, None, case.D, 4), case.H // case.G
    S, T = case.S, case.T or case.S
    all_rows = reference.visible(S, T, case.window, case.packing(), CPU).expand(case.B, S, T)
    visited = unmasked = 0
    for seen_ST in all_rows:
        seen = seen_ST.repeat_interleave(R, dim=0)  # rows of a key/value head
        kept, looped = blocks.rows, blocks.keys
        if kernel == "key_gradient":
            seen, kept, looped = seen.T, blocks.keys, blocks.rows
        for part in seen.split(kept):
            columns = part.any(0).nonzero().flatten()
            if len(columns) == 0:
                continue
            pieces = part[:, columns[0] : columns[-1] + 1].split(looped, dim=1)
            visited += len(pieces)
            # The last keys, where they fill no block, are masked throughout.
            whole = kernel != "key_gradient" or len(part) == kept
            unmasked += sum(whole and piece.shape[1] == looped and bool(piece.all()) for piece in pieces)
    return visited * case.G, unmasked * case.G


def counted_blocks(case: Case, monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[int, int]]:
    counts = {kernel: [0, 0] for kernel in ("forward", "query_gradient", "key_gradient")}
    loops = {"attend_keys": "forward", "add_keys": "query_gradient", "add_queries": "key_gradient"}
    inside, original_rows = [], triton_kernels.block_rows

    def counting_loop(name: str, loop):
        def count(*arguments):
            inside.append(counts[loops[name]])
            result = loop(*arguments)
            inside.pop()
            return result

        return count

    def counting_rows(first, length, rows, masked):  # every turn of a loop calls it once
        if inside:
            inside[-1][0] += 1
            inside[-1][1] += not masked
        return original_rows(first, length, rows, masked)

    with monkeypatch.context() as patch:
        for name in loops:
            patch.setattr(triton_kernels, name, counting_loop(name, getattr(triton_kernels, name)))
        patch.setattr(triton_kernels, "block_rows", counting_rows)
        forward_and_gradients("triton", case, torch.float32, rounded_to=torch.float32)
    return {kernel: (visited, unmasked) for kernel, (visited, unmasked) in counts.items()}


@pytest.mark.parametrize(
    "case",
    [
        Case(40, S=120, H=2, G=1, name="local"),
        Case(None, S=130, H=1, G=1, name="global"),
        Case(60, S=90, T=140, H=1, G=1, name="halo"),
        Case(60, S=150, H=1, G=1, documents=[[80, 70]], name="documents_local"),
        Case(None, S=150, H=1, G=1, documents=[[3, 77, 70]], name="documents_global"),
        # A key or query more or less in a bound, and one of these would have a block more or less.
        Case(None, S=40, T=54, H=1, G=1, name="diagonal_one_short"),
        Case(None, S=40, T=55, H=1, G=1, name="diagonal_just_whole"),
        Case(17, S=64, H=1, G=1, name="window_just_whole"),
        Case(47, S=96, H=1, G=1, name="window_one_short"),
        Case(None, S=96, H=1, G=1, documents=[[47, 49]], name="document_one_short"),
    ],
    ids=str,
)
def test_only_the_band_is_visited_and_only_its_edges_are_masked(case: Case, monkeypatch: pytest.MonkeyPatch):
    counted = counted_blocks(case, monkeypatch)
    assert counted == {kernel: expected_blocks(case, kernel) for kernel in counted}
