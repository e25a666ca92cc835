"""The contract, over every backend in the folder: a new file is tested by being there."""

import pytest
import torch
from attention_cases import CASES, CPU, Case, attention_spec, error, forward_and_gradients

from megazebra.attention import Packing, backend_names, load_backend

# Relative error of a whole tensor. Rounding errors of about eps each: sums of D products and of up to S weights
# add as random walks, and backward goes through two such sums more. `large_logits` multiplies a relative error
# of the logits (up to 400) into the weights.
TOLERANCE = {torch.float64: 2e-14, torch.float32: 2e-6}
LOGIT_TOLERANCE = {torch.float64: 2e-13, torch.float32: 5e-5}
# bf16 keeps 8 bits: rounding once is an error uniform in +-2^-9, so about 2^-9 / sqrt(3) * 1.4 = 1.6e-3 relative.
# Gradients also see the rounded output, through sum(dout * out).
BF16_OUT, BF16_GRADIENT = 2e-3, 6e-3
# Backends that also multiply in bf16 round the weights: another error of that size, independent of the first.
BF16_PRODUCTS_OUT = 3e-3
MULTIPLY_IN_BF16 = {"simd"}


@pytest.fixture(params=backend_names())
def backend(request: pytest.FixtureRequest) -> str:
    if why := load_backend(request.param).unavailable(CPU):
        pytest.skip(why)
    return request.param


def widest_dtype(backend: str, case: Case) -> torch.dtype:
    """float64 where the backend computes it: exact statements are the easiest to tell from rounding there."""
    refusal = load_backend(backend).unsupported(case.spec, head_dim=case.D, dtype=torch.float64, device=CPU)
    return torch.float64 if refusal is None else torch.float32


def assert_near(actual: list, expected: list, tolerances: list[float]) -> None:
    names = ("out", "dq", "dk", "dv", "dsinks")
    # With a window of one, dq and dk are zero up to rounding: measure those against dv.
    floor = expected[3].double().norm() * 0.1
    for name, a, b, tolerance in zip(names, actual, expected, tolerances, strict=False):
        assert a.shape == b.shape, name
        assert error(a, b, floor) < tolerance, f"{name}: {error(a, b, floor):.2e} >= {tolerance:.0e}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_float64_reference(backend: str, case: Case, dtype: torch.dtype):
    if why := load_backend(backend).unsupported(case.spec, head_dim=case.D, dtype=dtype, device=CPU):
        pytest.skip(why)
    expected = forward_and_gradients("reference", case, torch.float64, rounded_to=dtype)
    actual = forward_and_gradients(backend, case, dtype, rounded_to=dtype)
    assert all(x.dtype == dtype for x in actual)
    tolerance = (LOGIT_TOLERANCE if case.q_factor > 1 else TOLERANCE)[dtype]
    assert_near(actual, expected, [tolerance] * 5)


@pytest.mark.parametrize("case", [c for c in CASES if c.q_factor == 1], ids=str)
def test_bf16_is_rounded_as_little_as_it_must(backend: str, case: Case):
    if why := load_backend(backend).unsupported(case.spec, head_dim=case.D, dtype=torch.bfloat16, device=CPU):
        pytest.skip(why)
    expected = forward_and_gradients("reference", case, torch.float64, rounded_to=torch.bfloat16)
    actual = forward_and_gradients(backend, case, torch.bfloat16, rounded_to=torch.bfloat16)
    assert all(x.dtype == torch.bfloat16 for x in actual)
    out_tolerance = BF16_PRODUCTS_OUT if backend in MULTIPLY_IN_BF16 else BF16_OUT
    assert_near(actual, expected, [out_tolerance] + [BF16_GRADIENT] * 4)


def test_window_of_one_returns_the_values(backend: str):
    case = Case(1, S=130, B=2, H=4, G=2)
    out, dq, dk, dv = forward_and_gradients(backend, case, torch.float32, rounded_to=torch.float32)
    (_, _, v), dout = case.tensors(torch.float32)
    torch.testing.assert_close(out, v.detach().repeat_interleave(2, dim=2), rtol=2e-7, atol=0)
    torch.testing.assert_close(dv, dout.unflatten(2, (2, 2)).sum(3), rtol=1e-6, atol=1e-6)
    # dlogit = weight * (dout . v - dout . out): two sums of the same 32 products.
    assert max(dq.abs().max(), dk.abs().max()) < 2e-5


@pytest.mark.parametrize(("window", "softcap"), [(9, None), (9, 2.0), (None, None)])
@pytest.mark.parametrize("what", ["key", "value"])
def test_receptive_field_is_exactly_the_window(backend: str, window: int | None, softcap: float | None, what: str):
    lengths = [50, 1, 99]
    S, spec, packing = sum(lengths), attention_spec(window, softcap=softcap), Packing.from_document_lengths([lengths])
    attend = load_backend(backend).attend
    case = Case(window, S=S, H=2, G=1)
    (q, k, v), _ = case.tensors(widest_dtype(backend, case))
    document = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))
    distance = torch.arange(S)[:, None] - torch.arange(S)
    with torch.no_grad():
        before = attend(q, k, v, spec=spec, packing=packing)
        for j in (0, 41, 49, 50, 51, 63, 64, 127, 128, 149):
            perturbed = (k if what == "key" else v).clone()
            perturbed[:, j] += 1
            pair = (perturbed, v) if what == "key" else (k, perturbed)
            changed = (attend(q, *pair, spec=spec, packing=packing) != before).any(-1).any(-1)[0]
            seen = (distance[:, j] >= 0) & (distance[:, j] < (window or S)) & (document == document[j])
            if what == "key" and j in (0, 50, 51):  # a query's only key has weight 1 whatever the key, up to rounding
                seen[j] = changed[j]
            assert torch.equal(changed, seen), (j, changed.nonzero().flatten(), seen.nonzero().flatten())


def test_documents_equal_separate_calls(backend: str):
    lengths = [1, 70, 25]
    case = Case(10, S=96, H=4, G=2, documents=[lengths])
    dtype = widest_dtype(backend, case)
    (q, k, v), _ = case.tensors(dtype)
    attend = load_backend(backend).attend
    packed = attend(q, k, v, spec=case.spec, packing=case.packing())
    parts = [attend(*part, spec=case.spec) for part in zip(*(x.split(lengths, dim=1) for x in (q, k, v)), strict=True)]
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(packed, torch.cat(parts, dim=1), rtol=5000 * eps, atol=500 * eps)


def test_inputs_and_their_gradient_are_left_alone(backend: str):
    case = Case(7, S=70, sinks=True)
    leaves, dout = case.tensors(torch.float32)
    copies = [x.detach().clone() for x in (*leaves, dout)]
    out = load_backend(backend).attend(*leaves[:3], spec=case.spec, sinks_H=leaves[3])
    out.backward(dout)
    assert all(torch.equal(x, copy) for x, copy in zip((*leaves, dout), copies, strict=True))


def test_gradient_checkpointing_gives_the_same_bits(backend: str):
    case = Case(7, S=70, B=2, documents=[[30, 40], [70]])
    (q, k, v), dout = case.tensors(torch.float32)

    def attend(q, k, v):
        return load_backend(backend).attend(q, k, v, spec=case.spec, packing=case.packing())

    plain = torch.autograd.grad(attend(q, k, v), (q, k, v), dout)
    again = torch.utils.checkpoint.checkpoint(attend, q, k, v, use_reentrant=False)
    assert all(map(torch.equal, plain, torch.autograd.grad(again, (q, k, v), dout)))


BAD_CALLS = {
    "three_dims": ({"q": torch.zeros(8, 4, 16)}, r"q must be \[batch.*got \[8, 4, 16\]"),
    "empty": ({"q": torch.zeros(1, 0, 4, 16)}, r"none of them 0, got \[1, 0, 4, 16\]"),
    "integers": ({"q": torch.zeros(1, 8, 4, 16, dtype=torch.long)}, "floating dtype"),
    "dtypes": ({"k": torch.zeros(1, 8, 2, 16, dtype=torch.bfloat16)}, "bfloat16 for k"),
    "devices": ({"v": torch.zeros(1, 8, 2, 16, device="meta")}, "meta for v"),
    "values": ({"v": torch.zeros(1, 8, 1, 16)}, r"k and v must have one shape.*\[1, 8, 2, 16\].*\[1, 8, 1, 16\]"),
    "head_dim": ({"q": torch.zeros(1, 8, 4, 32)}, "share batch and head_dim"),
    "heads": ({"q": torch.zeros(1, 8, 3, 16)}, "multiple of key/value heads, got 3 and 2"),
    "queries": ({"q": torch.zeros(1, 9, 4, 16)}, "S=9 > T=8"),
    "window": ({"spec": attention_spec(0)}, ">= 1, got 0"),
    "sinks_missing": ({"spec": attention_spec(4, sinks=True)}, "spec.sinks=True and sinks None"),
    "sinks_unasked": ({"sinks": torch.zeros(4)}, r"spec.sinks=False and sinks \[4\]"),
    "sinks_shape": (
        {"spec": attention_spec(4, sinks=True), "sinks": torch.zeros(2)},
        r"be \[4\].*got \[2\]",
    ),
    "packing_length": ({"packing": Packing.from_document_lengths([[7]])}, r"\(1, 7, 7\).*\(1, 8, 8\)"),
    "packing_keys": ({"packing": Packing.from_spans([[8]], [[9]])}, r"\(1, 8, 9\).*\(1, 8, 8\)"),
    "packing_device": ({"packing": Packing.from_document_lengths([[8]], "meta")}, r"packing.to\(device\)"),
}


@pytest.mark.parametrize("bad", BAD_CALLS)
@pytest.mark.parametrize("name", backend_names())
def test_calls_that_do_not_fit_are_refused_by_name_and_value(name: str, bad: str):
    change, message = BAD_CALLS[bad]
    arguments = {"q": torch.zeros(1, 8, 4, 16), "k": torch.zeros(1, 8, 2, 16), "v": torch.zeros(1, 8, 2, 16)}
    arguments |= {"spec": attention_spec(4), "packing": None, "sinks": None} | change
    with pytest.raises(ValueError, match=message):
        load_backend(name).attend(
            *(arguments[x] for x in "qkv"),
            spec=arguments["spec"],
            packing=arguments["packing"],
            sinks_H=arguments["sinks"],
        )
