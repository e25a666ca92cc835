"""Attention of ranks that hold whole sequences (context-parallel size 1): the kernel alone."""

from __future__ import annotations

from torch import Tensor

from megazebra.attention.backend import BackendChoice
from megazebra.attention.packing import Packing
from megazebra.context.replay import Replay
from megazebra.parallel.mesh import Group
from megazebra.pattern import AttentionSpec


def attend(
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
    """Output [B, S, H, D] of this rank's queries, which are all of the sequence."""
    assert group.size == 1, "keys on other ranks would not be seen"
    return backend.attend(q_BSHD, k_BSGD, v_BSGD, spec=spec, packing=packing, sinks_H=sinks_H)
