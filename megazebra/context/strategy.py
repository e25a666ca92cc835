"""Which strategy a layer's attention takes when sequences are split over ranks. Resolved once per layer."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from megazebra.attention.backend import BackendChoice
from megazebra.attention.packing import Packing
from megazebra.context import single
from megazebra.parallel.mesh import Group
from megazebra.pattern import AttentionSpec


class Attend(Protocol):
    """What a strategy's file must hold under the name `attend`."""

    def __call__(
        self,
        q_BSHD: Tensor,
        k_BSGD: Tensor,
        v_BSGD: Tensor,
        *,
        spec: AttentionSpec,
        packing: Packing | None,
        backend: BackendChoice,
        group: Group,
        sinks_H: Tensor | None = None,
    ) -> Tensor:
        """Output [B, S, H, D] of this rank's queries; S is this rank's part of the sequence."""


def resolve_strategy(spec: AttentionSpec, group: Group) -> Attend:
    """The strategy for a layer of this spec. Raises ValueError when there is none for the group's size."""
    if group.size == 1:
        return single.attend
    raise ValueError(
        f"parallel.context={group.size}: no strategy for {spec.kind} layers exists yet; set parallel.context=1"
    )
