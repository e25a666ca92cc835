"""How a model runs, as opposed to what it computes (that is ModelConfig)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

from megazebra.attention.backend import BackendChoice
from megazebra.models import elementwise
from megazebra.parallel.mesh import Group
from megazebra.parallel.regather import ColumnInput, column_input


class Elementwise(Protocol):
    """What `models.elementwise` and `models.fused` both hold."""

    def rms_norm(self, x: Tensor, weight_E: Tensor, eps: float) -> Tensor: ...

    def swiglu(self, gate: Tensor, up: Tensor) -> Tensor: ...

    def rotate(self, x_BSHD: Tensor, cos: Tensor, sin: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class ModelRuntime:
    """backend: the attention kernels, already resolved for all layers.
    elementwise: the functions beside matrix products and attention.
    sequence_parallel: the residual stream is split over tp along the sequence.
    recompute: activation recomputation in backward.
    loss_chunk: tokens per chunk of the output layer and cross-entropy.
    """

    backend: BackendChoice
    elementwise: Elementwise = elementwise
    sequence_parallel: bool = False
    recompute: Literal["none", "selective", "full"] = "none"
    loss_chunk: int = 1024

    def enter(self, x_BSE: Tensor, tp: Group, label: str) -> ColumnInput:
        """The input of a block's column-parallel layers, as `column_input` gives it under these choices."""
        # A recomputed block holds the gathered input for the moment of its own backward only.
        return column_input(
            x_BSE,
            tp,
            sequence_parallel=self.sequence_parallel,
            keep_gathered=self.recompute == "full",
            label=label,
        )
