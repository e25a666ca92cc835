"""Samples drawn from several sources by weight: a pure function of the sample's number, exact for ever.

The sources are the leaves of a Huffman tree over their weights. Of the first n samples that come to a node, its left
child gets round(n a / b), where a is the child's weight and b the node's, and the right child the others. Weights are
integers, so nothing drifts: sample i costs one walk from the root, and the past never depends on how long a run gets.

After n samples every source has had its share of n, give or take less than 2, however many sources there are and
however unequal. Proof: let e be how far a node's count is from its share of n. Rounding moves a child by at most 1/2,
so a child with the share r of its parent has an error of at most r e + 1/2. Huffman's algorithm merges the lightest
nodes first, so a node is no heavier than its parent's sibling, and at most half of its grandparent: two steps down
with shares r, s < 1, r s <= 1/2, the error is at most r s e + s / 2 + 1/2 < e / 2 + 1, which is below 2 where e is.
At the root e is 0, at its children at most 1/2.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from megazebra.data.index.builder import native

MAX_SAMPLES = 2**62
WEIGHT_UNITS = 2**61


class Blend:
    """Draws from sources in proportion to `weights`, positive finite numbers of any scale.

    numerators: the weights as integers, in units of 2^-61 of their sum and at least 1; what the shares are exactly.

    Raises ValueError when there is no weight, or one that is not positive and finite.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        if not len(weights):
            raise ValueError("a blend needs at least one source, got no weights")
        for position, weight in enumerate(weights):
            if not (math.isfinite(weight) and weight > 0):
                raise ValueError(
                    f"weight {position} of the blend is {weight}; weights are positive and finite, "
                    f"leave out sources that are not wanted"
                )
        exact = [Fraction(float(weight)) for weight in weights]
        total = sum(exact)
        self.numerators = [max(1, round(weight / total * WEIGHT_UNITS)) for weight in exact]
        self._children, self._weights = _huffman(self.numerators)

    def locate(self, first: int, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Of samples first, first + 1, ...: the source, int64 [count], and the number within it, int64 [count].

        Each source gives its samples 0, 1, 2, ... in turn. Raises IndexError beyond 2^62 samples.
        """
        if first < 0 or count < 0 or first + count > MAX_SAMPLES:
            raise IndexError(f"samples {first} to {first + count} of a blend of {MAX_SAMPLES}")
        if (builder := native()) is not None:
            return builder.blend_locate(self._children, self._weights, first, count)
        children, weights = self._children.tolist(), self._weights.tolist()
        sources, indices = np.zeros(count, dtype=np.int64), np.zeros(count, dtype=np.int64)
        for i in range(count):
            node, sample = len(weights) - 1, first + i
            while node >= len(self.numerators):
                left, right = children[node - len(self.numerators)]
                before = _share(sample, weights[left], weights[node])
                goes_left = _share(sample + 1, weights[left], weights[node]) > before
                node, sample = (left, before) if goes_left else (right, sample - before)
            sources[i], indices[i] = node, sample
        return sources, indices

    def counts(self, n: int) -> NDArray[np.int64]:
        """How many of the first n <= 2^62 samples each source gives: int64 [sources]."""
        if not 0 <= n <= MAX_SAMPLES:
            raise IndexError(f"{n} samples of a blend of {MAX_SAMPLES}")
        weights = self._weights.tolist()
        counts = [0] * len(weights)
        counts[-1] = n
        for node in reversed(range(len(self.numerators), len(weights))):
            left, right = self._children[node - len(self.numerators)].tolist()
            counts[left] = _share(counts[node], weights[left], weights[node])
            counts[right] = counts[node] - counts[left]
        return np.array(counts[: len(self.numerators)], dtype=np.int64)


def _share(samples: int, part: int, whole: int) -> int:
    """round(samples * part / whole), halves up."""
    return (2 * samples * part + whole) // (2 * whole)


def _huffman(numerators: list[int]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The tree: children int64 [sources - 1, 2] of the nodes behind the sources, weights int64 of all nodes.

    Parents have higher numbers than their children, the root has the last. The left child is the heavier one, of
    equal ones the younger.
    """
    weights = list(numerators)
    children = np.zeros((len(numerators) - 1, 2), dtype=np.int64)
    light = [(weight, node) for node, weight in enumerate(weights)]
    heapq.heapify(light)
    for pair in children:
        (lighter, right), (heavier, left) = heapq.heappop(light), heapq.heappop(light)
        pair[:] = left, right
        heapq.heappush(light, (lighter + heavier, len(weights)))
        weights.append(lighter + heavier)
    return children, np.array(weights, dtype=np.int64)
