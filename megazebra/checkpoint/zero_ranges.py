"""Which elements of a tensor-parallel rank's weights each data-parallel rank holds under ZeRO, without an engine.

What a live engine holds is read from its own buffers (fragments.py); this is for files that are laid out for an
engine to come, or were left by one that is gone. Found by experiment with DeepSpeed 0.19, held by tests/checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from megazebra.plan.zero import padded


@dataclass(frozen=True, slots=True)
class Range:
    """Elements [start, start + count) of the flattened shard `name`; they begin at `offset` of the rank's buffer."""

    name: str
    start: int
    count: int
    offset: int


def owned_ranges(shapes: Mapping[str, Sequence[int]], zero_stage: int, ranks: int, rank: int) -> Iterator[Range]:
    """What data-parallel rank `rank` of `ranks` writes and reads of the shards with these shapes, in their order.

    Matrices lie in one buffer, weights of one dimension (which do not decay) in another. Under ZeRO-0 all ranks hold
    everything, and the first one writes.
    """
    numels = {name: prod(shape) for name, shape in shapes.items()}
    if zero_stage == 0:
        found = [Range(name, 0, numel, 0) for name, numel in numels.items() if rank == 0]
    elif zero_stage == 3:
        found = list(split_each(numels.items(), ranks, rank))
    else:
        groups = [[(n, numels[n]) for n in shapes if (len(shapes[n]) > 1) is decays] for decays in (True, False)]
        parts = [padded(sum(numel for _, numel in group), ranks) // ranks for group in groups]
        found = [
            piece for group, part in zip(groups, parts, strict=True) for piece in split_together(group, part, rank)
        ]
    order = {name: number for number, name in enumerate(shapes)}
    yield from sorted(found, key=lambda piece: order[piece.name])


def split_together(sizes: Iterable[tuple[str, int]], part: int, rank: int) -> Iterator[Range]:
    """ZeRO-1 and 2: the weights of a group end to end, of which every rank has `part` elements."""
    begin, end, position = rank * part, (rank + 1) * part, 0
    for name, numel in sizes:
        first, last = max(begin, position), min(end, position + numel)
        if first < last:
            yield Range(name, first - position, last - first, first - begin)
        position += numel


def split_each(sizes: Iterable[tuple[str, int]], ranks: int, rank: int) -> Iterator[Range]:
    """ZeRO-3: every weight is cut into equal parts, of which the last may end in padding; a rank's lie end to end."""
    offset = 0
    for name, numel in sizes:
        part = -(-numel // ranks)
        start = rank * part
        if start < numel:
            yield Range(name, start, min(part, numel - start), offset)
        offset += part
