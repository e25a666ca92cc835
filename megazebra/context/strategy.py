"""How a layer reaches keys on other context-parallel ranks. Every module that `STRATEGIES` names is a strategy."""

from __future__ import annotations

import importlib
from typing import Protocol, cast

from torch import Tensor

from megazebra.attention.backend import BackendChoice
from megazebra.attention.packing import Packing
from megazebra.context.replay import Replay
from megazebra.context.traffic import STRATEGIES
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
        label: str = "",
        replay: Replay | None = None,
    ) -> Tensor:
        """Output [B, n, H, D] of this rank's queries; q, k, v hold its part of every sequence, in the order of ranks.

        packing: that of the whole sequences, the same on all ranks. label: its messages are counted under it.
        replay: keeps what arrives, for a pass that recomputes this one and must not send again.
        """


def load_strategy(name: str, group: Group) -> Attend:
    """The strategy of a layer whose sequences `group` shares. Raises ValueError when it can't serve that many ranks."""
    if group.size == 1:
        name = "single"
    elif name not in STRATEGIES:
        raise ValueError(f"parallel.context={group.size}: a layer's strategy must be one of {', '.join(STRATEGIES)}, "
                         f"got {name!r}")  # fmt: skip
    return cast(Attend, importlib.import_module(f"megazebra.context.{name}").attend)
