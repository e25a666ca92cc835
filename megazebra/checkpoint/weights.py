"""Weights on disk, whichever kind of folder holds them: how large they are, and how different."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from megazebra.checkpoint.model_folder import ModelFolder
from megazebra.checkpoint.reader import TrainingCheckpoint
from megazebra.config.schema import ModelConfig

_BLOCK_ELEMENTS = 1 << 22


class Weights(Protocol):
    """Whole weights under Hugging Face's names, each read when it is asked for."""

    @property
    def folder(self) -> Path: ...

    @property
    def model(self) -> ModelConfig: ...

    @property
    def names(self) -> Sequence[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> torch.dtype: ...

    def tensor(self, name: str) -> Tensor: ...

    def verify(self, on_read: Callable[[int], None]) -> None: ...


def open_weights(path: str | Path) -> Weights:
    """The training checkpoint (of a run's folder, the latest) or the model folder at `path`.

    Raises CheckpointError when it is neither, or damaged.
    """
    if (Path(path) / "model.safetensors.index.json").exists():
        return ModelFolder.open(path)
    return TrainingCheckpoint.open(path)


class ReadOnDemand(Mapping[str, Tensor]):
    """Weights as a mapping by name. It keeps the last one read, no more."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights
        self._last: tuple[str, Tensor] | None = None

    def __getitem__(self, name: str) -> Tensor:
        if self._last is None or self._last[0] != name:
            if name not in self._weights.names:
                raise KeyError(name)
            self._last = None  # gone before the next one is read
            self._last = name, self._weights.tensor(name)
        return self._last[1]

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights.names)

    def __len__(self) -> int:
        return len(self._weights.names)


def all_names(one: Weights, other: Weights) -> list[str]:
    """The names of both, each once, in the first one's order."""
    return list(dict.fromkeys([*one.names, *other.names]))


def difference(name: str, one: Weights, other: Weights) -> str | None:
    """How the weights of that name differ, in words; None where they are equal.

    Values of two dtypes are compared in the coarser one: a copy in bfloat16 equals the master weights it was made from.
    """
    for weights, where in ((other, "first"), (one, "second")):
        if name not in weights.names:
            return f"only in the {where}"
    if one.shape(name) != other.shape(name):
        return f"shape {list(one.shape(name))} in the first, {list(other.shape(name))} in the second"
    relative = relative_difference(one.tensor(name), other.tensor(name))
    return f"relative norm of the difference {relative:.2e}" if relative else None


def norm(values: Tensor) -> float:
    """Euclidean norm of all elements, summed in float64; memory of one block."""
    return math.sqrt(sum(_square_sum(block.double()) for block in values.view(-1).split(_BLOCK_ELEMENTS)))


def relative_difference(one: Tensor, other: Tensor) -> float:
    """‖other − one‖ / ‖one‖ in the coarser dtype of the two, whose shapes are equal; inf where only `one` is zero."""
    dtype = max(one.dtype, other.dtype, key=lambda dtype: torch.finfo(dtype).eps)
    difference = size = 0.0
    for a, b in zip(*(tensor.view(-1).split(_BLOCK_ELEMENTS) for tensor in (one, other)), strict=True):
        a, b = a.to(dtype).double(), b.to(dtype).double()
        difference += _square_sum(b - a)
        size += _square_sum(a)
    if difference == 0:
        return 0.0
    return math.sqrt(difference / size) if size else math.inf


def _square_sum(block: Tensor) -> float:
    return torch.dot(block, block).item()
