"""Shards under Hugging Face's Llama names, split over tensor-parallel ranks by rows or by columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

from megazebra.checkpoint.regions import Span
from megazebra.checkpoint.store import CheckpointError
from megazebra.config.schema import ModelConfig
from megazebra.foreign.shards import Part, Shard, columns, rows, shortened
from megazebra.plan.parameters import parameters

EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"


def llama_parts(model: ModelConfig, ranks: Sequence[Mapping[str, Shard]]) -> dict[str, list[Part]]:
    """Which elements of which weight every shard is.

    Raises CheckpointError when a shard is missing or has another shape than the model's would have on so many ranks.
    """
    parts: dict[str, list[Part]] = {}
    problems: list[str] = []
    for whole, split in zip(parameters(model, 1), parameters(model, len(ranks)), strict=True):
        name, shape = whole.name, whole.shape
        parts[name] = []
        for rank, shards in enumerate(ranks):
            shard = shards.get(name)
            if shard is None:
                problems.append(f"{name} is missing on tensor-parallel rank {rank}")
            elif name in (EMBEDDING, OUTPUT) and vocabulary_fits(shard.shape, shape, len(ranks)):
                parts[name].append(Part(rank, name, 0, rows(shape, rank * shard.shape[0], shard.shape[0])))
            elif shard.shape != split.shape:
                problems.append(
                    f"{name} has shape {list(shard.shape)} on tensor-parallel rank {rank} of {len(ranks)}, the "
                    f"configuration asks for {list(split.shape)}"
                )
            else:
                parts[name].append(Part(rank, name, 0, _span(shape, split.shape, len(ranks), rank)))
    if problems:
        raise CheckpointError(f"the weights don't fit the configuration: {shortened(problems)}")
    return parts


def vocabulary_fits(shard: Sequence[int], whole: Sequence[int], ranks: int) -> bool:
    """Whether the rows of all ranks are the vocabulary, with any padding behind it."""
    return tuple(shard[1:]) == tuple(whole[1:]) and shard[0] * ranks >= whole[0]


def _span(whole: tuple[int, ...], shard: tuple[int, ...], ranks: int, rank: int) -> Span:
    if shard == whole:  # every rank holds the same: the first one's is taken
        return Span(whole, None, 1, 0, 0, prod(whole) if rank == 0 else 0)
    if shard[0] != whole[0]:
        return rows(whole, rank * shard[0], shard[0])
    return columns(whole, ranks, rank)
