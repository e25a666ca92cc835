"""Where a range of a rank's flattened shard lies in the whole weight, and copies between two such ranges.

A tensor-parallel rank holds some rows or some columns of a weight, and ZeRO cuts its flattened shard anywhere. In
the whole weight a range is therefore at most three rectangles: the rest of a row, whole rows, the start of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from math import prod

from torch import Tensor


@dataclass(frozen=True)
class Rectangle:
    """Rows [top, bottom) and columns [left, right) of a whole weight, and where a span's values hold them.

    The first element is value number `offset` of the span; the next row begins `stride` values later.
    """

    top: int
    bottom: int
    left: int
    right: int
    offset: int
    stride: int

    @property
    def elements(self) -> int:
        return max(0, self.bottom - self.top) * max(0, self.right - self.left)

    def part(self, other: Rectangle) -> Rectangle:
        """What of this rectangle lies in the other one too; it may have no elements."""
        top, left = max(self.top, other.top), max(self.left, other.left)
        offset = self.offset + (top - self.top) * self.stride + left - self.left
        return Rectangle(top, min(self.bottom, other.bottom), left, min(self.right, other.right), offset, self.stride)

    def view(self, values: Tensor) -> Tensor:
        """The rectangle (rows, columns) as a view of its span's values, a tensor of one dimension."""
        step = values.stride(0)
        return values.as_strided(
            (self.bottom - self.top, self.right - self.left),
            (self.stride * step, step),
            values.storage_offset() + self.offset * step,
        )


@dataclass(frozen=True)
class Span:
    """Elements [start, start + count) of tensor-parallel rank `tp_rank`'s flattened shard of a weight.

    shape: of the whole weight, one or two dimensions, without padding.
    partition_dim: the dimension that is split over `tp_size` ranks; None where every rank holds the whole weight.
    Shards are equally large: where the dimension does not divide, the last ones end in padding (vocabularies).
    """

    shape: Sequence[int]
    partition_dim: int | None
    tp_size: int
    tp_rank: int
    start: int
    count: int

    def __post_init__(self) -> None:
        assert len(self.shape) in (1, 2)
        assert self.partition_dim is None or 0 <= self.partition_dim < len(self.shape)
        assert 0 <= self.tp_rank < self.tp_size
        assert self.start >= 0
        assert self.count >= 0
        assert self.start + self.count <= prod(self.shard_shape)

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Span:
        """All elements of a weight that is not split."""
        return cls(shape, None, 1, 0, 0, prod(shape))

    @property
    def shard_shape(self) -> tuple[int, ...]:
        """Shape of the shard this is a range of, with padding."""
        return tuple(
            -(-size // self.tp_size) if dim == self.partition_dim else size for dim, size in enumerate(self.shape)
        )

    @property
    def real_elements(self) -> int:
        """How many elements are no padding."""
        return sum(rectangle.elements for rectangle in self.rectangles())

    def rectangles(self) -> list[Rectangle]:
        """The span in the whole weight, without padding: at most three rectangles, in the order of the elements.

        A weight of one dimension counts as one column.
        """
        rows, columns = (*self.shape, 1)[:2]
        height, width = (*self.shard_shape, 1)[:2]
        first_row = self.tp_rank * height if self.partition_dim == 0 else 0
        first_column = self.tp_rank * width if self.partition_dim == 1 else 0
        end = self.start + self.count
        whole_rows = min(-(-self.start // width) * width, end)
        last_row = max(end // width * width, whole_rows)
        found = []
        for begin, stop in pairwise((self.start, whole_rows, last_row, end)):
            if begin == stop:
                continue
            top, left = first_row + begin // width, first_column + begin % width
            rectangle = Rectangle(
                top,
                min(top + -(-(stop - begin) // width), rows),
                left,
                min(left + min(stop - begin, width), columns),
                offset=begin - self.start,
                stride=width,
            )
            if rectangle.elements:
                found.append(rectangle)
        return found

    def overlaps(self, other: Span) -> bool:
        """Whether both spans hold some element of the weight, padding apart."""
        return any(mine.part(its).elements for mine, its in product(self.rectangles(), other.rectangles()))


def copy_overlap(source: Span, source_values: Tensor, target: Span, target_values: Tensor) -> int:
    """Copy the elements of the weight that both spans hold; returns how many.

    source_values (source.count,) and target_values (target.count,) may be views, of any dtype and device. Padding is
    nobody's: a target is complete when what was copied from disjoint sources adds up to `target.real_elements`, and
    its padding keeps what it was.
    """
    assert tuple(source.shape) == tuple(target.shape)
    assert source_values.shape == (source.count,)
    assert target_values.shape == (target.count,)
    copied = 0
    for theirs, ours in product(source.rectangles(), target.rectangles()):
        common = ours.part(theirs)
        if common.elements:
            common.view(target_values).copy_(theirs.part(ours).view(source_values))
            copied += common.elements
    return copied
