"""Whole weights from the shards of other trainers' ranks, one at a time.

Two questions have separate answers, so that every kind of folder goes with every kind of names: where in the files the
elements of a rank's shard lie (`Shard`, from deepspeed_zero.py or megatron_files.py), and which elements of which whole
weight they are (`Part`, from llama_names.py or megatron_names.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from megazebra.checkpoint.regions import Span
from megazebra.checkpoint.store import CheckpointError
from megazebra.checkpoint.tensor_file import BLOCK_ELEMENTS, StoredTensor
from megazebra.config.schema import ModelConfig

_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Piece:
    """Elements of a flattened shard from `start` on, as many as `stored` has (one dimension)."""

    start: int
    stored: StoredTensor

    @property
    def end(self) -> int:
        return self.start + self.stored.shape[0]

    @classmethod
    def part_of(cls, stored: StoredTensor, offset: int, count: int, start: int) -> Piece:
        """Elements [offset, offset + count) of a flattened tensor, which are those of the shard from `start` on."""
        assert 0 <= offset <= offset + count <= prod(stored.shape)
        position = stored.position + offset * stored.dtype.itemsize
        return cls(start, replace(stored, shape=(count,), position=position))


@dataclass(frozen=True)
class Shard:
    """A tensor-parallel rank's part of a tensor. pieces: of the weight ('master') and of each moment there is.

    scalars: what the optimizer counts for it.
    """

    shape: tuple[int, ...]
    pieces: dict[str, list[Piece]]
    scalars: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, stored: StoredTensor) -> Shard:
        return cls(stored.shape, {"master": [Piece.part_of(stored, 0, prod(stored.shape), 0)]})


@dataclass(frozen=True)
class ShardedModel:
    """What a folder holds. ranks: for every tensor-parallel rank its shards by name.

    options: the trainer's own, where it left any. progress: 'step' and what else is known.
    """

    description: str
    ranks: Sequence[Mapping[str, Shard]]
    options: dict[str, Any]
    progress: dict[str, int]


@dataclass(frozen=True, slots=True)
class Part:
    """Elements [start, start + span.count) of the shard `name` on tensor-parallel rank `rank`: `span` of a weight."""

    rank: int
    name: str
    start: int
    span: Span


class ForeignWeights:
    """The whole weights of a model under Hugging Face's names, as a training checkpoint gives them.

    parts: of every weight, in the model's order. Raises CheckpointError when the parts don't make up the weights, or
    the ranks hold something else too.
    """

    def __init__(self, model: ModelConfig, sharded: ShardedModel, parts: Mapping[str, Sequence[Part]]) -> None:
        self.model = model
        self.progress = sharded.progress
        self._ranks, self._parts = sharded.ranks, parts
        used = {(part.rank, part.name) for several in parts.values() for part in several}
        unused = [
            f"{name} on rank {rank}"
            for rank, shards in enumerate(self._ranks)
            for name in shards
            if (rank, name) not in used
        ]
        if unused:
            raise CheckpointError(
                f"{sharded.description} holds tensors that the configuration has no place for: {shortened(unused)}; "
                "correct the model's configuration, or this is no Llama-style model"
            )
        for name, several in parts.items():
            found, wanted = sum(part.span.real_elements for part in several), prod(self.shape(name))
            if found != wanted:
                raise CheckpointError(f"{sharded.description} holds {found:,} of {wanted:,} elements of {name}")

    @property
    def names(self) -> list[str]:
        return list(self._parts)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._parts[name][0].span.shape)

    def dtype(self, name: str) -> torch.dtype:
        return self._shard(self._parts[name][0]).pieces["master"][0].stored.dtype

    def states(self, name: str) -> list[str]:
        """'master', and what the optimizer has of the weight, such as 'exp_avg'."""
        return list(self._shard(self._parts[name][0]).pieces)

    def scalars(self, name: str) -> dict[str, float]:
        return self._shard(self._parts[name][0]).scalars

    def tensor(self, name: str, what: str = "master", dtype: torch.dtype | None = None) -> Tensor:
        """The whole weight, or one of its `states`, on the CPU, in the dtype it was saved in or in `dtype`.

        Raises OSError when a file cannot be read.
        """
        whole = torch.empty(self.shape(name), dtype=dtype or self.dtype(name))
        target, copied = Span.whole(whole.shape), 0
        for part in self._parts[name]:
            for piece in self._shard(part).pieces[what]:
                begin, end = max(part.start, piece.start), min(part.start + part.span.count, piece.end)
                if begin < end:
                    source = replace(part.span, start=part.span.start + begin - part.start, count=end - begin)
                    common = Piece.part_of(piece.stored, begin - piece.start, end - begin, begin)
                    copied += common.stored.copy_overlap(source, target, whole.view(-1), BLOCK_ELEMENTS)
        if copied != whole.numel():
            raise CheckpointError(f"its files hold {copied:,} of {whole.numel():,} elements of {name} ({what})")
        return whole

    def _shard(self, part: Part) -> Shard:
        return self._ranks[part.rank][part.name]


def rows(shape: Sequence[int], first: int, count: int) -> Span:
    """Rows [first, first + count) of a whole weight of one or two dimensions, as far as it has them."""
    width = prod(shape[1:])
    first, last = min(first, shape[0]), min(first + count, shape[0])
    return Span(shape, None, 1, 0, first * width, (last - first) * width)


def columns(shape: Sequence[int], ranks: int, rank: int) -> Span:
    """The columns of a whole matrix that are a rank's, all rows."""
    return Span(shape, 1, ranks, rank, 0, prod(shape) // ranks)


def shortened(problems: Sequence[str]) -> str:
    more = f" and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
    return "; ".join(problems[:_SHOWN]) + more
