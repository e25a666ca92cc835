"""Shuffles that store nothing: a keyed bijection of [0, n), evaluated where it is asked.

A Feistel network permutes the smallest power of two that holds n, 64 at least; values that land beyond n are sent
through again until they don't (cycle walking). Integers only, hence the same on every platform. Keys are 64-bit
integers, and a key and a number give a new key: whoever knows an epoch's key can derive those of its blocks.
"""

from __future__ import annotations

import hashlib
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megazebra.data.index.builder import native

ROUNDS = 8
MIN_BITS = 6  # smaller networks favour some permutations
MASK = 2**64 - 1


def derive_key(*parts: int | str) -> int:
    """A 64-bit key chosen by `parts`, integers modulo 2^64 and strings."""
    key = 0
    for part in parts:
        if isinstance(part, str):
            part = int.from_bytes(hashlib.sha256(part.encode()).digest()[:8], "little")
        key = _splitmix64(key ^ _splitmix64(part & MASK))
    return key


class KeyedPermutation:
    """Bijection of [0, size) chosen by `key`, whose parts are those of `derive_key`; size from 1 to 2^63."""

    def __init__(self, size: int, *key: int | str) -> None:
        self.size = size
        self.key = derive_key(*key)

    def __call__(self, value: int) -> int:
        """The image of a value in [0, size)."""
        if (builder := native()) is not None:
            return builder.permute(self.size, self.key, value)
        image = self._network(value)
        while image >= self.size:
            image = self._network(image)
        return image

    def all(self) -> NDArray[np.int64]:
        """The images of 0, 1, ..., size - 1: int64 [size]."""
        if (builder := native()) is not None:
            return builder.permute_all(self.size, self.key)
        network = self._network(np.arange(1 << self._bits, dtype=np.uint64)).astype(np.int64)
        images = network[: self.size].copy()
        while (beyond := np.flatnonzero(images >= self.size)).size:
            images[beyond] = network[images[beyond]]
        return images

    @property
    def _bits(self) -> int:
        return max((self.size - 1).bit_length(), MIN_BITS)

    @cached_property
    def _round_keys(self) -> list[int]:
        return [derive_key(self.key, turn) for turn in range(ROUNDS)]

    def _network(self, values: Any) -> Any:
        """One pass: the halves take turns, each XORed with a hash of the other, which keeps it invertible.

        Python integers and uint64 arrays take the same path.
        """
        left_bits = self._bits // 2
        right_bits = self._bits - left_bits
        left_mask, right_mask = (1 << left_bits) - 1, (1 << right_bits) - 1
        left, right = values >> right_bits, values & right_mask
        for turn, round_key in enumerate(self._round_keys):
            if turn % 2 == 0:
                right = right ^ (_splitmix64(left + round_key) & right_mask)
            else:
                left = left ^ (_splitmix64(right + round_key) & left_mask)
        return (left << right_bits) | right


def _splitmix64(values: Any) -> Any:
    """The 64-bit generator SplitMix64 (Steele, Lea and Flood 2014) as a hash of its state."""
    mixed = (values + 0x9E3779B97F4A7C15) & MASK
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & MASK
    return mixed ^ (mixed >> 31)
