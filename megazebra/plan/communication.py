"""What one rank receives in a step of training, before it has run. Exact: tests count the same bytes. No torch.

The result is a TrafficCounter with the groups, kinds and labels that `ParallelMesh.traffic` has after a real step. Only
the kind of a context-parallel layer's traffic is its strategy's name, which stands for several collectives.
"""

from __future__ import annotations

from megazebra.config.checks import gradient_accumulation_steps
from megazebra.config.schema import Config
from megazebra.context.choice import layer_shape, resolve_specs
from megazebra.context.traffic import received
from megazebra.parallel.traffic import TrafficCounter
from megazebra.plan.parameters import parameters
from megazebra.plan.zero import record_zero
from megazebra.plan.zero_gathers import ZeroSettings
from megazebra.train.deepspeed_config import effective_zero_stage

_DEFAULTS = ZeroSettings()
_MESSAGES = {"halo": 2, "ulysses": 4, "allgather": 6}  # of a layer, forward and backward


def step_traffic(
    config: Config, world_size: int, cp_rank: int | None = None, zero: ZeroSettings = _DEFAULTS
) -> TrafficCounter:
    """Received in a whole step by one rank, of sequences that are one document each.

    cp_rank: its place among the context-parallel ranks; None takes one in the middle, which both borrows and lends.
    Raises ConfigError when the global batch doesn't fit the ranks, ValueError when a strategy can't serve its layers.
    """
    parallel = config.parallel
    sharing = world_size // parallel.tensor  # ranks with the same weights
    micro_batches = gradient_accumulation_steps(config, sharing // parallel.context)
    traffic = TrafficCounter()
    _tensor_parallel(traffic, config)
    _context_parallel(traffic, config, parallel.context // 2 if cp_rank is None else cp_rank)
    for tally in traffic.tallies.values():
        tally.calls *= micro_batches
        tally.bytes *= micro_batches
    record_zero(traffic, config, parameters(config.model, parallel.tensor), sharing, micro_batches, zero)
    _control(traffic, config, sharing, world_size)
    return traffic


def _context_parallel(traffic: TrafficCounter, config: Config, rank: int) -> None:
    if config.parallel.context == 1:
        return
    shape = layer_shape(config)
    for i, spec in enumerate(resolve_specs(config)):
        label = f"layers.{i}.self_attn.{spec.kind}.{spec.context}"
        traffic.record_received(spec.context, "cp", received(spec.context, spec, shape, rank).total, label)
        traffic.tallies["cp", spec.context, label].calls = _MESSAGES[spec.context]


def _tensor_parallel(traffic: TrafficCounter, config: Config) -> None:
    """Of one micro-batch (Shoeybi et al. 2019; with sequence parallelism Korthikanti et al. 2022).

    Every block enters tensor parallelism twice and leaves it twice. Full recomputation repeats a block's forward pass
    up to the input of the down projection.
    """
    model, size, recompute = config.model, config.parallel.tensor, config.train.recompute
    if size == 1:
        return
    sequence_parallel = config.parallel.sequence_parallel
    shape = layer_shape(config)
    tokens = shape.batch * shape.local_len
    residual = tokens * model.hidden_size * shape.element_bytes
    forwards = 2 if recompute == "full" else 1

    def record(label: str, kind: str, full_bytes: int, times: int = 1) -> None:
        for _ in range(times):
            traffic.record(kind, "tp", size, full_bytes, label)

    def enter(label: str, forwards: int) -> None:
        if sequence_parallel:
            again = label != "lm_head" and recompute != "full"  # in backward, for the gradients of the weights
            record(label, "all_gather", residual, forwards + again)
            record(label, "reduce_scatter", residual)
        else:
            record(label, "all_reduce", residual)

    def leave(label: str, forwards: int) -> None:
        if sequence_parallel:
            record(label, "reduce_scatter", residual, forwards)
            record(label, "all_gather", residual)
        else:
            record(label, "all_reduce", residual, forwards)

    width_bytes = model.hidden_size * shape.element_bytes
    leave("embed_tokens", 1)
    for i, spec in enumerate(model.attention_specs()):
        attention, mlp = f"layers.{i}.self_attn.{spec.kind}", f"layers.{i}.mlp"
        enter(attention, forwards)
        leave(attention, forwards)
        enter(mlp, forwards)
        leave(mlp, 1)
        if sequence_parallel:  # gradients of what each rank applies to its own positions
            record(attention, "all_reduce", width_bytes, times=model.attention_bias)
            record(mlp, "all_reduce", width_bytes, times=model.mlp_bias)
            record("norm", "all_reduce", width_bytes, times=2)
        if model.qk_norm:
            record("norm", "all_reduce", model.head_size * shape.element_bytes, times=2)
    if sequence_parallel:
        record("norm", "all_reduce", width_bytes)
    enter("lm_head", 1)
    for first in range(0, tokens, config.train.loss_chunk):
        numbers = 4 * min(config.train.loss_chunk, tokens - first)
        record("loss", "all_reduce", numbers)  # maxima
        record("loss", "all_reduce", 2 * numbers)  # sums of exponentials, logits of the labels


def _control(traffic: TrafficCounter, config: Config, sharing: int, world_size: int) -> None:
    """Numbers that the engine and the loop agree on."""
    if sharing > 1:
        traffic.record("all_reduce", "dp_cp", sharing, 8, "valid_tokens")
        traffic.record("all_reduce", "dp_cp", sharing, 8, "loss")
    if config.parallel.tensor > 1 and effective_zero_stage(config) == 0:
        traffic.record("all_reduce", "tp", config.parallel.tensor, 8, "grad_norm")
    if world_size > 1:
        traffic.record("all_reduce", "world", world_size, 4, "guard")
        traffic.record("all_reduce", "world", world_size, 4 * (1 + world_size), "step_times")
