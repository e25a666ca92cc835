"""Shuffles that store nothing: a keyed bijection of [0, n), evaluated where it is asked.

A Feistel network permutes the smallest power of two that holds n; values that land beyond n are sent through
again until they don't (cycle walking), fewer than two rounds on average. Integers only, hence the same on every
platform; Python integers and uint64 arrays take the same path through the same code.
"""

from __future__ import annotations

import hashlib
import struct
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

ROUNDS = 8
MASK = 2**64 - 1


class KeyedPermutation:
    """Bijection of [0, size) chosen by `key`; any values that print alike are the same key.

    Calling it maps an int, or elementwise a uint64 array of one dimension; the argument has to be in range.
    """

    def __init__(self, size: int, *key: object) -> None:
        self.size = size
        digest = hashlib.sha512("/".join(map(str, key)).encode()).digest()
        self._round_keys = struct.unpack(f"<{ROUNDS}Q", digest)
        bits = max((size - 1).bit_length(), 1)
        self._left_bits = bits // 2
        self._right_bits = bits - self._left_bits

    @overload
    def __call__(self, values: int) -> int: ...
    @overload
    def __call__(self, values: NDArray[np.uint64]) -> NDArray[np.uint64]: ...
    def __call__(self, values: Any) -> Any:
        permuted = self._network(values)
        if isinstance(values, int):
            while permuted >= self.size:
                permuted = self._network(permuted)
            return permuted
        beyond = np.flatnonzero(permuted >= self.size)
        while beyond.size:
            permuted[beyond] = self._network(permuted[beyond])
            beyond = beyond[permuted[beyond] >= self.size]
        return permuted

    def _network(self, values: Any) -> Any:
        """One pass: the halves take turns, each XORed with a hash of the other, which keeps it invertible."""
        left_mask, right_mask = (1 << self._left_bits) - 1, (1 << self._right_bits) - 1
        left, right = values >> self._right_bits, values & right_mask
        for turn, key in enumerate(self._round_keys):
            if turn % 2 == 0:
                right = right ^ (_scramble(left, key) & right_mask)
            else:
                left = left ^ (_scramble(right, key) & left_mask)
        return (left << self._right_bits) | right


def _scramble(values: Any, key: int) -> Any:
    """A 64-bit hash (the finalizer of SplitMix64, Steele et al. 2014)."""
    mixed = (values + key) & MASK
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & MASK
    return mixed ^ (mixed >> 31)
