"""What a model asks of a cache of keys and values; `generate.cache` is one.

Legend: B batch, S tokens of this forward pass, H query heads and G key/value heads of this rank, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from megazebra.attention.backend import BackendChoice


class LayerCache(Protocol):
    """What one layer keeps of the tokens before."""

    def attend(
        self, q_BSHD: Tensor, k_BSGD: Tensor, v_BSGD: Tensor, *, backend: BackendChoice, sinks_H: Tensor | None
    ) -> Tensor:
        """Keep the new keys and values; output [B, S, H, D] of the new queries over all that the layer lets them see.

        Queries and keys are rotated already.
        """


class Cache(Protocol):
    """The caches of all layers, in a model that is asked for one part of its sequences after the other."""

    @property
    def capacity(self) -> int:
        """Tokens of a whole row."""

    @property
    def layers(self) -> Sequence[LayerCache]: ...

    def begin(self, count: int) -> Tensor:
        """Start a forward pass over the next `count` tokens of every row; their positions, int64 [B, count]."""
