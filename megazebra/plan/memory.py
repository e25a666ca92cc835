"""Memory of one rank at its peak, from shapes. No torch.

What DeepSpeed 0.19 and the model hold, in bytes per weight (N of a tensor-parallel rank, P ranks that share them):

                    weights   gradients          AdamW's states
    fp32, stage 0   4 N       4 N                8 N
    fp32, stage 1   4 N       4 N                (4 + 8) N / P
    fp32, stage 2   4 N       4 N / P            (4 + 8) N / P
    bf16, stage 1   2 N       4 N, and 2 N of a micro-batch   (4 + 8) N / P
    bf16, stage 2   2 N       4 N / P            (4 + 8) N / P
    stage 3         e N / P   4 N / P            (4 + 8) N / P

Under ZeRO the master weights are a copy even where the weights are float32 already. Gradients pass through a bucket
of DeepSpeed's, half a billion elements by default, which is allocated whole.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from megazebra.config.checks import gradient_accumulation_steps
from megazebra.config.schema import Config
from megazebra.context.choice import resolve_specs
from megazebra.plan import activations
from megazebra.plan.activations import Sizes
from megazebra.plan.parameters import parameters
from megazebra.plan.zero_gathers import ZeroSettings, gathers
from megazebra.train.deepspeed_config import effective_zero_stage

_DEFAULTS = ZeroSettings()


@dataclass(frozen=True)
class Memory:
    """Bytes at one moment. optimizer: its states and master weights. loss: logits of a chunk and their gradients.
    buffers: what is only there for the moment.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int = 0
    loss: int = 0
    buffers: int = 0

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))


def peak_memory(config: Config, world_size: int, *, resident: bool = False, zero: ZeroSettings = _DEFAULTS) -> Memory:
    """The moment of a step that needs most, once the optimizer has its states.

    resident: of buffers count what is written, as the resident memory of a process does; else all that is allocated.
    Raises ConfigError when the global batch doesn't fit the ranks, ValueError when a strategy can't serve its layers.
    """
    return max(moments(config, world_size, resident=resident, zero=zero).values(), key=lambda moment: moment.total)


def moments(config: Config, world_size: int, *, resident: bool, zero: ZeroSettings) -> dict[str, Memory]:
    """The moments that can be the peak."""
    model, parallel = config.model, config.parallel
    sharing = world_size // parallel.tensor
    accumulates = gradient_accumulation_steps(config, sharing // parallel.context) > 1
    specs, sizes = resolve_specs(config), Sizes.of(config)
    weights = parameters(model, parallel.tensor)
    numel = sum(weight.numel for weight in weights)
    largest = max(weight.numel for weight in weights) * sizes.shape.element_bytes
    states = _States.of(config, numel, sharing, zero, resident)
    if states.stage == 3:
        states = states.with_gathered(gathers(model, weights, config.train.recompute, sharing, zero).live)

    at_rest = Memory(states.weights, states.gradients_kept, states.optimizer, buffers=states.standing_buffers)
    at_end = max(states.gradients_kept, states.gradients_after_backward)
    before = at_end if accumulates else states.gradients_kept
    rows = -(-model.vocab_size // parallel.tensor)
    chunk = min(config.train.loss_chunk, sizes.tokens) * rows
    head_gradient = rows * model.hidden_size * 4
    last_block = activations.block(config, specs[-1], sizes)
    kept = activations.kept(config, specs, sizes)
    recomputed = last_block if config.train.recompute == "full" else 0
    # Gradients of gate, up and their product, of which the product itself is let go, and of the residual stream.
    backward = 2 * sizes.ffn + 2 * sizes.residual + sizes.whole + largest
    first_block = activations.block(config, specs[0], sizes)
    return {
        "loss": replace(
            at_rest,
            gradients=before,
            activations=kept + sizes.whole,
            loss=chunk * _logit_bytes(config) + head_gradient,
        ),
        "backward begins": replace(
            at_rest,
            gradients=before + (0 if accumulates else head_gradient),
            activations=kept + recomputed,
            buffers=at_rest.buffers + backward,
        ),
        "backward ends": replace(
            at_rest,
            gradients=at_end,
            activations=first_block,
            buffers=at_rest.buffers + backward + states.reduce_buffers,
        ),
        "step": replace(at_rest, gradients=at_end, buffers=at_rest.buffers + states.step_buffers),
    }


def _logit_bytes(config: Config) -> int:
    """Of one logit: float32, in bf16 also the product before and the gradient after it; tanh under a soft-cap."""
    capped = 4 if config.model.final_logit_softcap is not None else 0
    return 4 + capped + (2 if config.train.precision == "bf16" else 0)


@dataclass(frozen=True)
class _States:
    """Of weights, gradients and optimizer; see the table above."""

    stage: int
    element: int
    weights: int
    gradients_kept: int  # allocated for the whole run
    gradients_after_backward: int
    optimizer: int
    standing_buffers: int
    reduce_buffers: int  # at the end of backward
    step_buffers: int

    @classmethod
    def of(cls, config: Config, numel: int, sharing: int, zero: ZeroSettings, resident: bool) -> _States:
        stage = effective_zero_stage(config)
        in_bf16 = config.train.precision == "bf16"
        element = 2 if in_bf16 else 4
        sgd_moments = 4 if config.optimizer.momentum else 0
        moments = 8 if config.optimizer.name == "adamw" else sgd_moments
        share = -(-numel // sharing)
        filled = min(numel, zero.reduce_bucket)
        bucket = filled if resident else zero.reduce_bucket
        if stage == 0:
            flat = 4 * filled if sharing > 1 else 0
            return cls(stage, element, 4 * numel, 0, 4 * numel, moments * numel, 0, 0, flat)
        optimizer = (4 + moments) * share
        if stage == 1 and in_bf16:
            # Both flat buffers are joined for the all-reduce where they fit into one bucket.
            joined = 4 * numel if sharing > 1 and numel <= zero.reduce_bucket else 0
            return cls(stage, element, 2 * numel, 4 * numel, 6 * numel, optimizer, 0, 0, joined)
        wide = 4 * filled if in_bf16 else 0  # bf16 gradients are widened to be reduced
        if stage == 1:
            return cls(stage, element, 4 * numel, 0, 4 * numel, optimizer, 0, 0, 4 * bucket + 4 * share)
        if stage == 2:
            return cls(stage, element, element * numel, 0, 4 * share, optimizer, 0, element * bucket + wide, 4 * share)
        return cls(stage, element, element * share, 4 * share, 4 * share, optimizer, 4 * bucket, 4 * filled, 4 * share)

    def with_gathered(self, live: int) -> _States:
        """ZeRO-3 holds some weights whole while it computes."""
        return replace(self, weights=self.weights + live * self.element)
