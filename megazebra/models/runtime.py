"""How a model runs, as opposed to what it computes (that is ModelConfig)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megazebra.attention.backend import BackendChoice


@dataclass(frozen=True)
class ModelRuntime:
    """backend: the attention kernels, already resolved for all layers.
    sequence_parallel: the residual stream is split over tp along the sequence.
    recompute: activation recomputation in backward.
    loss_chunk: tokens per chunk of the output layer and cross-entropy.
    """

    backend: BackendChoice
    sequence_parallel: bool = False
    recompute: Literal["none", "selective", "full"] = "none"
    loss_chunk: int = 1024
