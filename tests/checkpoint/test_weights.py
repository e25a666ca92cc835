"""Norms of weights, and what is said of two that differ."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from support.allocations import Allocations
from support.training import tiny_config
from torch import Tensor

from megazebra.checkpoint import weights
from megazebra.checkpoint.model_folder import ModelFolder, ModelFolderWriter
from megazebra.checkpoint.reader import TrainingCheckpoint
from megazebra.checkpoint.weights import all_names, difference, norm, open_weights, relative_difference


@pytest.fixture(params=[7, 1 << 22])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Elements that are looked at together: more or fewer must not matter."""
    monkeypatch.setattr(weights, "_BLOCK_ELEMENTS", request.param)
    return request.param


def test_norm_is_that_of_float64(block: int) -> None:
    values = torch.randn(12, 9, generator=torch.Generator().manual_seed(1))
    assert norm(values) == pytest.approx(values.double().norm().item(), rel=1e-14)
    assert norm(torch.full((300,), 1e-30)) == pytest.approx(math.sqrt(300) * 1e-30, rel=1e-6), "no underflow of squares"


def test_memory_of_a_norm_is_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "_BLOCK_ELEMENTS", 1000)
    values = torch.ones(100_000, dtype=torch.bfloat16)
    with Allocations() as allocations:
        norm(values)
        relative_difference(values, values.view(100_000))
    assert max(allocations.bytes) == 8 * 1000


def test_relative_difference(block: int) -> None:
    one = torch.tensor([3.0, 4.0] * 10)
    other = one.clone()
    other[13] += 0.5
    assert relative_difference(one, one.clone()) == 0
    assert relative_difference(one, other) == pytest.approx(0.5 / (5 * math.sqrt(10)), rel=1e-12)
    assert relative_difference(torch.zeros(20), one) == math.inf
    assert math.isnan(relative_difference(one, torch.full((20,), math.nan)))


def test_a_rounded_copy_is_equal_and_a_changed_one_is_not() -> None:
    master = torch.randn(50, generator=torch.Generator().manual_seed(2))
    rounded = master.bfloat16()
    assert relative_difference(master, rounded) == relative_difference(rounded, master) == 0
    rounded[7] *= 1.01
    assert relative_difference(master, rounded) > 0


def model_folder(path: Path, tensors: dict[str, Tensor]) -> ModelFolder:
    with ModelFolderWriter(path, tiny_config().model) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    return ModelFolder.open(path)


def test_differences_in_words(tmp_path: Path) -> None:
    one = model_folder(tmp_path / "one", {"a": torch.ones(4), "b": torch.ones(2), "c": torch.ones(3)})
    other = model_folder(tmp_path / "other", {"c": torch.ones(3) * 1.5, "d": torch.ones(1), "b": torch.ones(2, 1)})
    assert all_names(one, other) == ["a", "b", "c", "d"]
    assert {name: difference(name, one, other) for name in "abcd"} == {
        "a": "only in the first",
        "b": "shape [2] in the first, [2, 1] in the second",
        "c": "relative norm of the difference 5.00e-01",
        "d": "only in the second",
    }
    assert [difference(name, one, one) for name in "abc"] == [None, None, None]


def test_opens_both_kinds_of_folder(sharded: Path, tmp_path: Path) -> None:
    model_folder(tmp_path / "model", {"a": torch.ones(4)})
    assert isinstance(open_weights(tmp_path / "model"), ModelFolder)
    assert isinstance(open_weights(sharded), TrainingCheckpoint)
