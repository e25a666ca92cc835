"""Ranges of flattened shards against tensors that number the elements of the whole weight, cut as the model cuts it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import combinations, combinations_with_replacement, pairwise
from math import prod

import pytest
import torch
from torch import Tensor

from megazebra.checkpoint.regions import Span, copy_overlap
from megazebra.parallel.mesh import Group
from megazebra.parallel.sharding import mark_sharded, shard_of

# (shape, partition_dim): some divide over 2, 3 and 4 ranks, some leave padding, some leave a rank with nothing else.
WEIGHTS: list[tuple[tuple[int, ...], int | None]] = [
    ((6, 4), None),
    ((12, 2), 0),
    ((5, 3), 0),
    ((1, 3), 0),
    ((3, 5), 1),
    ((2, 12), 1),
    ((4, 1), 1),
    ((7,), None),
    ((8,), 0),
    ((5,), 0),
]
LAYOUTS = [(tp_size, tp_rank) for tp_size in (1, 2, 3, 4) for tp_rank in range(tp_size)]


def shard_numbers(shape: tuple[int, ...], dim: int | None, tp_size: int, tp_rank: int) -> Tensor:
    """For every element of the flattened shard its number in the whole weight, from 1; padding is 0."""
    whole = torch.arange(1, prod(shape) + 1).view(shape)
    parameter, shard_shape = torch.empty(0), list(shape)
    if dim is not None:
        mark_sharded(parameter, dim=dim, full_size=shape[dim])
        shard_shape[dim] = -(-shape[dim] // tp_size)
    group = Group("tp", tuple(range(tp_size)), tp_rank)
    return shard_of(whole, parameter, torch.Size(shard_shape), group).flatten()


def all_spans(shape: tuple[int, ...], dim: int | None) -> Iterator[tuple[Span, Tensor]]:
    """Every range, empty ones too, of every rank's shard, with the numbers of its elements."""
    for tp_size, tp_rank in LAYOUTS:
        numbers = shard_numbers(shape, dim, tp_size, tp_rank)
        for start, end in combinations_with_replacement(range(len(numbers) + 1), 2):
            yield Span(shape, dim, tp_size, tp_rank, start, end - start), numbers[start:end]


@pytest.mark.parametrize(("shape", "dim"), WEIGHTS)
def test_rectangles_are_where_the_elements_are(shape: tuple[int, ...], dim: int | None) -> None:
    whole = torch.arange(1, prod(shape) + 1).view(*shape, *[1] * (2 - len(shape)))
    for span, numbers in all_spans(shape, dim):
        found = span.rectangles()
        assert len(found) <= 3
        covered = torch.zeros_like(numbers)
        for rectangle in found:
            assert rectangle.elements > 0
            part = whole[rectangle.top : rectangle.bottom, rectangle.left : rectangle.right]
            assert torch.equal(rectangle.view(numbers), part)
            rectangle.view(covered).add_(1)
        assert torch.equal(covered, (numbers > 0).long()), "each element once, padding never"
        assert span.real_elements == covered.sum()


@pytest.mark.parametrize(("shape", "dim"), [((3, 2), 0), ((2, 3), 1), ((5,), 0), ((2, 2), None)])
def test_every_range_copied_into_every_other(shape: tuple[int, ...], dim: int | None) -> None:
    spans = list(all_spans(shape, dim))
    for source, source_numbers in spans:
        present = torch.zeros(prod(shape) + 1, dtype=torch.bool)
        present[source_numbers] = True
        for target, target_numbers in spans:
            values = torch.zeros_like(target_numbers)
            copied = copy_overlap(source, source_numbers, target, values)
            expected = torch.where(present[target_numbers], target_numbers, 0)
            assert torch.equal(values, expected)
            assert copied == expected.count_nonzero()
            assert source.overlaps(target) == (copied > 0)


@pytest.mark.parametrize(("shape", "dim"), [((37, 12), 0), ((12, 37), 1), ((24, 24), 0), ((24, 24), 1), ((101,), 0)])
def test_a_shard_from_the_pieces_of_another_layout(shape: tuple[int, ...], dim: int) -> None:
    draw = random.Random(f"{shape} {dim}")
    for source_size, target_size in combinations((1, 2, 3, 4), 2):
        for written, wanted in ((source_size, target_size), (target_size, source_size)):
            for rank in range(wanted):
                expected = shard_numbers(shape, dim, wanted, rank)
                target = Span(shape, dim, wanted, rank, 0, len(expected))
                values, copied = torch.zeros_like(expected), 0
                for piece, numbers in random_pieces(shape, dim, written, draw):
                    copied += copy_overlap(piece, numbers, target, values)
                assert torch.equal(values, expected)
                assert copied == target.real_elements


def random_pieces(shape: tuple[int, ...], dim: int, tp_size: int, draw: random.Random) -> Iterator[tuple[Span, Tensor]]:
    for tp_rank in range(tp_size):
        numbers = shard_numbers(shape, dim, tp_size, tp_rank)
        cuts = sorted(draw.sample(range(1, len(numbers)), 5))
        for start, end in pairwise([0, *cuts, len(numbers)]):
            yield Span(shape, dim, tp_size, tp_rank, start, end - start), numbers[start:end]


def test_views_of_larger_buffers_and_other_dtypes() -> None:
    shape, half = (4, 6), Span((4, 6), 1, 2, 1, 2, 8)
    numbers = shard_numbers(shape, 1, 2, 1)[2:10]
    source = torch.full((30,), -1.0)
    source[5:29:3] = numbers.float()
    target = torch.full((51,), 99, dtype=torch.bfloat16)
    copied = copy_overlap(half, source[5:29:3], Span.whole(shape), target[2:50:2])
    assert copied == 8
    expected = torch.full((24,), 99, dtype=torch.bfloat16)
    expected[numbers - 1] = numbers.bfloat16()
    assert torch.equal(target[2:50:2], expected), "elements that the source does not hold stay"
    assert (target[1::2] == 99).all()
    assert target[0] == target[50] == 99, "and so does what lies around the view"
