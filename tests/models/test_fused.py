"""The functions fused by torch.compile compute what the eager ones do, also inside a model with recomputation."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor
from zebras import make_model, random_tokens, small_config

from megazebra.config import Config
from megazebra.models import elementwise
from megazebra.models.build import model_runtime

# Of torch's own, while its compiler is loaded and at work.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]

CPU = torch.device("cpu")
CONFIG = small_config(qk_norm=True, num_layers=2, pattern="GL")


@pytest.fixture
def fused() -> Any:
    return importlib.import_module("megazebra.models.fused")


def _step(recompute: str, functions: Any) -> tuple[Tensor, dict[str, Tensor]]:
    model = make_model(CONFIG, recompute=recompute, elementwise=functions)
    loss = model(*random_tokens(CONFIG, 2, 24))
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert len(gradients) == len(list(model.parameters()))
    return loss.detach(), gradients


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_a_model_has_the_same_loss_and_gradients(recompute: str, fused: Any) -> None:
    loss, gradients = _step(recompute, fused)
    expected_loss, expected = _step("none", elementwise)
    # float32 in both, summed in another order: 2^-24 for each of some hundred roundings on the way of a number.
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=0)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=1e-5 * expected[name].abs().max().item())


def test_bf16_stays_bf16(fused: Any) -> None:
    x, weight = torch.randn(2, 7, 4, 8, dtype=torch.bfloat16), torch.rand(8, dtype=torch.bfloat16)
    cos, sin = torch.rand(2, 2, 7, 1, 4)
    calls: list[tuple[str, tuple[Any, ...]]] = [
        ("rms_norm", (x, weight, 1e-5)),
        ("swiglu", (x, x)),
        ("rotate", (x, cos, sin)),
    ]
    for name, arguments in calls:
        own, eager = getattr(fused, name)(*arguments), getattr(elementwise, name)(*arguments)
        assert own.dtype == torch.bfloat16
        # Two roundings in one and one in the other at most.
        torch.testing.assert_close(own, eager, rtol=3 * 2**-8, atol=1e-3)


def test_the_key_chooses_them(fused: Any) -> None:
    for switched_on, functions in ((True, fused), (False, elementwise)):
        config = Config.model_validate({"train": {"compile": switched_on}, "model": {"num_layers": 4}})
        assert model_runtime(config, CPU).elementwise is functions


def test_without_a_compiler_it_is_refused(fused: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(function: Any) -> Any:
        def call(*_: Any) -> Any:
            raise RuntimeError("No working C++ compiler found\nand more")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(ValueError, match=r"train\.compile=true, but torch\.compile fails on this cpu: No working"):
        fused.check_compiler(CPU)
