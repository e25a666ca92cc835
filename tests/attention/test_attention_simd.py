"""The CPU kernel's numbers, with every instruction set that this processor has: accuracy, determinism, edges."""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from types import ModuleType

import pytest
import torch
from attention_cases import CASES, CPU, Case, attention_spec, error, forward_and_gradients
from torch import Tensor

from megazebra.attention import Packing, blocked, reference, simd
from megazebra.pattern import AttentionSpec

# Relative error of a whole tensor. float32: sums of D products and of the seen keys' weights, in parts of some dozens
# each, round like random walks of a few eps = 6e-8.
# bf16: a number rounded to 8 bits is off by 1.6e-3. The weights are, and the result is: 1.6e-3 * sqrt(2) = 2.3e-3;
# gradients also see the output's rounding, in sum(dout * out).
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 3e-3}
# The sinks' gradient is H numbers only, in each of which such errors of all queries meet.
SINKS_TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 6e-3}
# Rounding a logit of 30 |q| |k| / sqrt(D) = 400 changes its weight by 400 eps, and where one key has nearly all the
# weight, dout * v - dout * out cancels: the rounding of the output is relative to less.
PEAKED_TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1.2e-2}
NAMES = ("out", "dq", "dk", "dv", "dsinks")
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(params=simd.instruction_sets())
def instruction_set(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(simd, "instruction_sets", lambda: [request.param])
    return request.param


@pytest.fixture
def restore_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@cache
def expected_of(name: str, dtype: torch.dtype) -> list[Tensor]:
    """In float64, from inputs rounded to dtype. `blocked` where the reference would take S * T numbers too many."""
    case = CASES_BY_NAME[name]
    exact = "blocked" if case.S * (case.T or case.S) > 2e6 else "reference"
    return forward_and_gradients(exact, case, torch.float64, rounded_to=dtype)


def error_of(actual: Tensor, expected: Tensor) -> float:
    return error(actual, expected, torch.zeros(()))


# Odd multiples of 16 are what the 32 bf16 numbers of a vector do not divide.
HEAD_DIMS = [Case(33, S=150, D=D, name=f"D{D}") for D in (32, 48, 64, 80, 96, 112, 128, 256)]
# Lengths beyond the kernel's panels (768 to 2560 keys) and chunks (1536 queries, or rows of a key/value head).
LONG = [
    Case(None, S=4000, H=2, G=1, name="panels_and_chunks"),
    Case(2001, S=4000, H=1, G=1, name="window_beyond_a_chunk"),
    Case(700, S=3501, H=3, G=1, name="three_heads_share_odd_panels"),
    Case(100, S=700, H=5, G=1, name="five_heads_share"),
    Case(None, S=100, T=4000, H=2, G=1, name="keys_chunks_before"),
    Case(3000, S=101, T=4001, H=2, G=1, name="keys_chunks_before_in_a_window"),
    Case(None, S=4000, H=1, G=1, documents=[[1000, 1, 1600, 1399]], name="documents_over_chunks"),
    Case(800, S=2000, H=2, G=1, B=2, documents=[[1535, 2, 463], [1536, 464]], sinks=True, name="documents_at_chunks"),
]
CASES_BY_NAME = {case.name: case for case in (*[c for c in CASES if c.S < 1000], *HEAD_DIMS, *LONG)}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES_BY_NAME)
def test_equals_float64(instruction_set: str, name: str, dtype: torch.dtype) -> None:
    case = CASES_BY_NAME[name]
    expected = expected_of(name, dtype)
    actual = forward_and_gradients("simd", case, dtype, rounded_to=dtype)
    # Where each query sees one key, dq and dk are zero: the difference of two sums of the size of dv.
    floor = expected[3].norm() if expected[1].norm() < 1e-6 * expected[3].norm() else torch.zeros(())
    for what, a, b in zip(NAMES, actual, expected, strict=False):
        tolerance = (PEAKED_TOLERANCE if case.q_factor > 1 else SINKS_TOLERANCE if what == "dsinks" else TOLERANCE)[
            dtype
        ]
        assert a.dtype == dtype
        assert a.shape == b.shape
        assert error(a, b, floor) < tolerance, f"{what}: {error(a, b, floor):.2e} >= {tolerance:.1e}"


SEVERAL_OF_ALL = Case(
    300, S=1603, B=2, H=4, G=2, sinks=True, softcap=20.0, documents=[[903, 700], [1540, 63]], name="several"
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_bits_over_runs_and_threads(instruction_set: str, dtype: torch.dtype, restore_threads: None) -> None:
    def run(_: object = None) -> list[Tensor]:
        return forward_and_gradients("simd", SEVERAL_OF_ALL, dtype, rounded_to=dtype)

    once = run()
    torch.set_num_threads(3)
    leave_no_number_behind(dtype)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert all(map(torch.equal, once, run())), threads
    with ThreadPoolExecutor(2) as pool:
        assert all(all(map(torch.equal, once, again)) for again in pool.map(run, range(2)))


def leave_no_number_behind(dtype: torch.dtype) -> None:
    """Fills the workspaces that calls of the kernel share with what would show in the next."""
    case = Case(None, S=1600, B=3, H=1, G=1, D=64)
    (q, k, v), dout = case.tensors(dtype)
    simd.attend(q * math.nan, k, v * math.nan, spec=case.spec).backward(dout)


@pytest.mark.parametrize("window", [3, None])
def test_rows_and_heads_do_not_depend_on_each_other(instruction_set: str, window: int | None) -> None:
    (q, k, v), _ = Case(window, S=200, B=3, H=6, G=3).tensors(torch.float32)
    spec = attention_spec(window)
    together = simd.attend(q, k, v, spec=spec)
    alone = simd.attend(q[1:2, :, 2:4], k[1:2, :, 1:2], v[1:2, :, 1:2], spec=spec)
    assert torch.equal(together[1:2, :, 2:4], alone)


def longest(x: Tensor) -> float:
    return x.double().norm(dim=-1).max().item()


def check_against_float64(
    inputs: list[Tensor],
    spec: AttentionSpec,
    *,
    packing: Packing | None = None,
    sinks: Tensor | None = None,
    slack: float = 1.0,
) -> list[Tensor]:
    """Inputs are q, k, v and dout. Returns out, dq, dk, dv (and dsinks).

    Tolerates what the reference gets wrong in float32, the rounding of logits and of their log-sum-exp, from which
    backward computes the weights again, and that of the output, which is what is left where dout * (v - out) cancels.
    """
    (*inputs, dout), dtype = inputs, inputs[0].dtype
    other = reference if dout.shape[1] < 1000 else blocked

    def compute(backend: ModuleType, dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.detach().to(dtype).requires_grad_() for x in (*inputs, *([] if sinks is None else [sinks]))]
        out = backend.attend(*leaves[:3], spec=spec, packing=packing, sinks_H=None if sinks is None else leaves[3])
        return [out.detach(), *torch.autograd.grad(out, leaves, dout.to(dtype))]

    actual, exact, in_float32 = compute(simd, dtype), compute(other, torch.float64), compute(other, torch.float32)
    root = math.sqrt(dout.shape[-1])
    logit = min(longest(inputs[0]) * longest(inputs[1]) / root, spec.softcap or math.inf)
    dlogits = dout.double().norm() * longest(exact[0]) / root  # before they cancel
    uncancelled = {"dq": dlogits * longest(inputs[1]) / root, "dk": dlogits * longest(inputs[0]) / root,
                   "dsinks": dlogits}  # fmt: skip
    for what, a, b, c in zip(NAMES, actual, exact, in_float32, strict=False):
        size = b.norm() + uncancelled.get(what, 0)
        limit = slack * ((TOLERANCE[dtype] + 3 * 2**-24 * logit) * size + 3 * (c.double() - b).norm())
        difference = (a.double() - b).norm()
        assert difference <= limit, f"{what}: {difference:.2e} > {limit:.1e}, of {b.norm():.1e}"
    return actual


def normals(*shape: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """q, k, v and dout."""
    random = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=random).to(dtype) for _ in range(4)]


# Logits of at most 60 log(2) = 42 are computed without maxima; a maximum may be out of date by 6 log(2).
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("largest", [4.0, 41.0, 42.0, 90.0, 700.0])
def test_logits_of_one_size_and_either_sign(instruction_set: str, largest: float, dtype: torch.dtype) -> None:
    q, k, v, dout = normals(1, 200, 2, 32, dtype=dtype)
    q = torch.ones_like(q)
    k = k[..., :1].sign() * (largest / math.sqrt(32)) * torch.ones_like(k)
    for window in (40, None):
        check_against_float64([q, k, v, dout], attention_spec(window))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("factor", [30, 1000])
@pytest.mark.parametrize("where", ["everywhere", "some_queries", "late_keys", "early_keys"])
def test_large_logits(instruction_set: str, where: str, factor: float, dtype: torch.dtype) -> None:
    q, k, v, dout = normals(1, 300, 2, 32, dtype=dtype)
    if where == "everywhere":
        q *= factor
    elif where == "some_queries":
        q[:, ::50] *= factor
    else:
        k[:, slice(200, None) if where == "late_keys" else slice(100)] *= factor
    for window in (64, None):
        check_against_float64([q, k, v, dout], attention_spec(window))


@pytest.mark.parametrize(("large", "window"), [((1200, 3100), 1600), ((0, 1000), 2500), ((900, 1500), None)], ids=str)
def test_some_panels_of_large_logits(instruction_set: str, large: tuple[int, int], window: int | None) -> None:
    # The last queries of a chunk see nothing of the first of its panels, which has small logits and needs no maxima.
    q, k, v, dout = normals(1, 3100, 1, 32)
    q = 0.1 * q + 1
    k[:, slice(*large)] -= 100
    check_against_float64([q, k, v, dout], attention_spec(window))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("softcap", [0.1, 2.0, 41.0, 42.0, 1000.0])
def test_softcap_of_large_logits(instruction_set: str, softcap: float, dtype: torch.dtype) -> None:
    q, k, v, dout = normals(1, 150, 2, 32, dtype=dtype)
    for window in (40, None):
        check_against_float64([50 * q, k, v, dout], attention_spec(window, softcap=softcap))


SINKS = torch.tensor([-math.inf, -1e4, -3.0, 2.0, 41.0, 42.0, 1e4])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("factor", [1, 30])
def test_sinks_of_all_sizes(instruction_set: str, factor: float, dtype: torch.dtype) -> None:
    q, k, v, dout = normals(1, 100, len(SINKS), 32, dtype=dtype)
    q *= factor
    out = check_against_float64([q, k, v, dout], attention_spec(20, sinks=True), sinks=SINKS.to(dtype))[0]
    without = simd.attend(q, k, v, spec=attention_spec(20))
    assert torch.equal(out[:, :, 0], without[:, :, 0])
    assert not out[:, :, -1].any()


def test_a_sink_that_is_not_a_number_shows(instruction_set: str) -> None:
    q, k, v, _ = normals(1, 20, 2, 32)
    out = simd.attend(q, k, v, spec=attention_spec(5, sinks=True), sinks_H=torch.tensor([math.nan, 0.0]))
    assert out[:, :, 0].isnan().all()
    assert not out[:, :, 1].isnan().any()


@pytest.mark.parametrize("factor", [1, 300])
@pytest.mark.parametrize("window", [9, None])
@pytest.mark.parametrize("what", ["query", "key", "value"])
def test_not_a_number_reaches_those_who_see_it(
    instruction_set: str, what: str, window: int | None, factor: float
) -> None:
    q, k, v, _ = normals(1, 130, 1, 32)
    bad = 60
    # Large logits beside it still need their maxima.
    (q if what == "query" else k)[:, 50:55] *= factor
    spec = attention_spec(window)
    expected = reference.attend(q.double(), k.double(), v.double(), spec=spec)
    {"query": q, "key": k, "value": v}[what][:, bad, :, 3] = math.nan
    out = simd.attend(q, k, v, spec=spec)
    sees = torch.arange(130) == bad if what == "query" else reference.visible(130, 130, window, None, CPU)[0, :, bad]
    if what == "value":  # a weight of zero times what is not a number is no number either: other rows may have it
        assert out[:, sees, :, 3].isnan().all()
        out[..., 3] = expected[..., 3]
    else:
        assert out[:, sees].isnan().all()
        out[:, sees] = expected[:, sees].float()
    assert error_of(out, expected) < PEAKED_TOLERANCE[torch.float32]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [9, None])
def test_infinite_keys(instruction_set: str, window: int | None, dtype: torch.dtype) -> None:
    q, k, v, _ = normals(1, 130, 2, 32, dtype=dtype)
    k[:, 60:63, 0, 3] = -math.inf  # logits of -inf for some queries, of inf for others
    q[:, :, 1, 3] = 1.0
    k[:, ::7, 1, 3] = -math.inf  # the first query sees no other
    spec = attention_spec(window)
    out = simd.attend(q, k, v, spec=spec)
    expected = reference.attend(q.double(), k.double(), v.double(), spec=spec)
    assert torch.equal(out.isnan(), expected.isnan())
    assert expected[0, :, 0].isnan().any()
    assert expected[0, :, 1].isnan().any(-1).nonzero().flatten().tolist() == [0]
    assert error_of(out.nan_to_num(), expected.nan_to_num()) < TOLERANCE[dtype]


def test_a_sink_takes_all_weight_where_logits_are_infinitely_small(instruction_set: str) -> None:
    q, k, v, _ = normals(1, 100, 1, 32)
    q[..., 3], k[:, :30, :, 3] = 1.0, -math.inf
    leaves = [x.requires_grad_() for x in (q, k, v, torch.zeros(1))]
    out = simd.attend(*leaves[:3], spec=attention_spec(10, sinks=True), sinks_H=leaves[3])
    _, dk, dv, dsinks = torch.autograd.grad(out.sum(), leaves)
    assert not out[:, :30].any()
    assert out.isfinite().all()
    assert not dk[:, :30].any()
    assert not dv[:, :30].any()
    assert dsinks.isfinite()
