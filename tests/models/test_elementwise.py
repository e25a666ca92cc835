"""RMSNorm, SwiGLU's product and the rotation: values, gradients, and what they must not allocate or keep."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from support.allocations import Allocations
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from megazebra.models import elementwise
from megazebra.models.elementwise import rms_norm, rotate, swiglu

B, S, H, D = 2, 5, 2, 4
EPS = 1e-5


@pytest.fixture(params=["one chunk", "uneven chunks", "chunks of a row"])
def _chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    elements = {"one chunk": 2**18, "uneven chunks": 3 * H * D, "chunks of a row": 1}[request.param]
    monkeypatch.setattr(elementwise, "CHUNK_ELEMENTS", {"cpu": elements, "cuda": elements})


def _random(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(sum(shape))).requires_grad_()


def _tables(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    angles = torch.rand(B, S, 1, D // 2, generator=torch.Generator().manual_seed(0), dtype=dtype) * 6
    return angles.cos() * 1.3, angles.sin() * 1.3


@pytest.mark.usefixtures("_chunks")
def test_gradients() -> None:
    x, weight = _random(B, S, H, D), _random(D)
    assert torch.autograd.gradcheck(lambda x, weight: rms_norm(x, weight, EPS), (x, weight))
    assert torch.autograd.gradcheck(swiglu, (_random(B, S, D), _random(B, S, D)))
    cos, sin = _tables()
    assert torch.autograd.gradcheck(lambda x: rotate(x, cos, sin), (x,))


@pytest.mark.usefixtures("_chunks")
def test_values_are_those_of_the_formulas() -> None:
    x, weight, up = _random(B, S, H, D), _random(D), _random(B, S, H, D)
    exact = {"rtol": 1e-14, "atol": 1e-14}  # float64: a few units in the last place of numbers near one
    mean_square = (x * x).mean(-1, keepdim=True)
    torch.testing.assert_close(rms_norm(x, weight, EPS), x / (mean_square + EPS).sqrt() * weight, **exact)
    torch.testing.assert_close(swiglu(x, up), x * torch.sigmoid(x) * up, **exact)
    cos, sin = _tables()
    pairs = torch.complex(*x.chunk(2, dim=-1)) * torch.complex(cos, sin)
    torch.testing.assert_close(rotate(x, cos, sin), torch.cat([pairs.real, pairs.imag], dim=-1), **exact)


@pytest.mark.usefixtures("_chunks")
def test_strided_inputs_and_gradients() -> None:
    """Heads before tokens in memory, as some attention kernels return them; a gradient of one number, broadcast."""
    cos, sin = _tables()
    weight, up = _random(D), _random(B, S, H, D)
    functions: list[Callable[[Tensor], Tensor]] = [
        lambda x: rms_norm(x, weight, EPS),
        lambda x: swiglu(x, up),
        lambda x: rotate(x, cos, sin),
    ]
    for function in functions:
        strided = _random(B, H, S, D).detach().transpose(1, 2).requires_grad_()
        plain = strided.detach().contiguous().requires_grad_()
        for x in (strided, plain):
            function(x).sum().backward()
        assert torch.equal(function(strided), function(plain))
        assert torch.equal(strided.grad, plain.grad)


def test_a_norm_in_bf16_is_rounded_once() -> None:
    """Against float64 on the same numbers: bf16 rounds by at most 2^-8 of a number."""
    x, weight = _random(64, 32, dtype=torch.bfloat16), _random(32, dtype=torch.bfloat16)
    wide_x, wide_weight = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    out, wide_out = rms_norm(x, weight, EPS), F.rms_norm(wide_x, (32,), wide_weight, EPS)
    out.sum().backward()
    wide_out.sum().backward()
    for own, exact in ((out, wide_out), (x.grad, wide_x.grad), (weight.grad, wide_weight.grad)):
        assert own is not None
        assert exact is not None
        assert own.dtype == torch.bfloat16
        torch.testing.assert_close(own.double(), exact, rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whole_tensors_are_results_only(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither float32 copies of bf16 activations nor temporaries of their size, forward or backward."""
    rows, chunk = 1024, 16
    elements = chunk * D // torch.get_num_threads()
    monkeypatch.setattr(elementwise, "CHUNK_ELEMENTS", {"cpu": elements, "cuda": elements})
    x, up, grad = (_random(1, rows, 1, D, dtype=dtype) for _ in range(3))
    weight = _random(D, dtype=dtype)
    cos, sin = torch.randn(2, 1, rows, 1, D // 2)
    for function, wanted, results in (
        (lambda: rms_norm(x, weight, EPS), [x, weight], [x, x]),  # the output and the gradient
        (lambda: swiglu(x, up), [x, up], [x, x, x]),
        (lambda: rotate(x, cos, sin), [x], [x, x, sin]),  # back by the negative angle
    ):
        with Allocations() as allocated:
            torch.autograd.grad(function(), wanted, grad)
        large = [size for size in allocated.bytes if size > max(chunk * D, rows) * 4]  # a norm keeps rows scales
        assert sorted(large) == sorted(tensor.nbytes for tensor in results)


def test_what_backward_keeps() -> None:
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    x, up, weight = _random(B, S, D), _random(B, S, D), _random(D)
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        rms_norm(x, weight, EPS)
    scales = [tensor for tensor in kept if tensor.shape == (B * S, 1)]
    assert len(scales) == 1
    assert {t.data_ptr() for t in kept} == {t.data_ptr() for t in (x, weight, scales[0])}
    kept.clear()
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        swiglu(x, up)
    assert {t.data_ptr() for t in kept} == {x.data_ptr(), up.data_ptr()}
