"""What DeepSpeed's ZeRO receives in a step, found by experiment with 0.19. Imports no torch.

Gradients travel in float32 (`communication_data_type`), weights in the run's own precision.

    stage 0, and 1  all-reduce of all gradients, once a step
    stage 2         all-reduce of all gradients in every micro-batch: by default DeepSpeed joins the buckets of all
                    ranks (`use_multi_rank_bucket_allreduce`), which costs twice a reduce-scatter
    stage 3         reduce-scatter of all gradients in every micro-batch; gathers of weights (`zero_gathers`)
    stages 1 and 2  all-gather of the updated weights
    stage 3         all-gather of the small weights that every rank keeps whole

and a few bytes to agree on norms and overflows, of each parameter group.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from megazebra.config.schema import Config
from megazebra.parallel.traffic import TrafficCounter
from megazebra.plan.parameters import Parameter
from megazebra.plan.zero_gathers import ZeroSettings, gathers
from megazebra.train.deepspeed_config import effective_zero_stage

_START_ALIGNMENT = 2  # elements; DeepSpeed's, of every rank's part of a flat buffer


def groups(weights: Sequence[Parameter]) -> list[list[Parameter]]:
    """The optimizer's: matrices, which decay, and the others."""
    kinds = [[w for w in weights if len(w.shape) > 1], [w for w in weights if len(w.shape) == 1]]
    return [group for group in kinds if group]


def padded(numel: int, ranks: int) -> int:
    """Elements of a flat buffer of so many weights, which ranks share evenly."""
    return -(-numel // (_START_ALIGNMENT * ranks)) * _START_ALIGNMENT * ranks


def record_zero(
    traffic: TrafficCounter,
    config: Config,
    weights: tuple[Parameter, ...],
    ranks: int,
    micro_batches: int,
    settings: ZeroSettings,
) -> None:
    """Count a step. weights: of one tensor-parallel rank. ranks: those that share them (data x context)."""
    stage, tensor = effective_zero_stage(config), config.parallel.tensor
    in_bf16 = config.train.precision == "bf16"
    element_bytes = 2 if in_bf16 else 4
    kinds = groups(weights)

    def record(kind: str, size: int, full_bytes: int, times: int = 1) -> None:
        for _ in range(times if size > 1 else 0):
            traffic.record(kind, "zero", size, full_bytes, "zero")

    def agree(full_bytes: int, times: int = 1) -> None:
        record("all_reduce", ranks, full_bytes, times)
        record("all_reduce", tensor, full_bytes, times)

    if stage <= 2:
        for bucket in _buckets([weight.numel for weight in weights], settings.reduce_bucket):
            record("all_reduce", ranks, 4 * bucket, micro_batches if stage == 2 else 1)
    if stage == 1 and in_bf16:
        record("all_reduce", tensor, 4)  # DeepSpeed's optimizer for bf16 has whole gradients: only tp adds up norms
    elif stage in (1, 2):
        if in_bf16:
            agree(1)
        agree(4, len(kinds))
    if stage in (1, 2):
        for kind in kinds:
            record("all_gather", ranks, padded(sum(w.numel for w in kind), ranks) * element_bytes)
    if stage == 3:
        _record_gathers(traffic, config, weights, ranks, micro_batches, settings, element_bytes)
        agree(8, len(kinds))


def _record_gathers(
    traffic: TrafficCounter,
    config: Config,
    weights: tuple[Parameter, ...],
    ranks: int,
    micro_batches: int,
    settings: ZeroSettings,
    element_bytes: int,
) -> None:
    if ranks == 1:
        return
    whole = {weight.name: math.ceil(weight.numel / ranks) * ranks for weight in weights}
    small = [weight.name for weight in weights if weight.numel <= settings.persistence_threshold]
    found = gathers(config.model, weights, config.train.recompute, ranks, settings)
    tally = traffic.tallies["zero", "all_gather", "zero"]
    tally.calls += micro_batches * found.calls + len(small)
    received = micro_batches * found.gathered + sum(whole[name] for name in small)
    tally.bytes += received * element_bytes * (ranks - 1) // ranks
    for bucket in _buckets(list(whole.values()), settings.reduce_bucket):
        for _ in range(micro_batches):
            traffic.record("reduce_scatter", "zero", ranks, 4 * bucket, "zero")


def _buckets(numels: Sequence[int], limit: int) -> list[int]:
    """Elements of the buckets that gradients fill as they come, last weights first."""
    found, elements = [], 0
    for numel in reversed(numels):
        if elements and elements + numel > limit:
            found.append(elements)
            elements = 0
        elements += numel
    return [*found, elements]
