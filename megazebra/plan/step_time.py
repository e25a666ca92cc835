"""Seconds of a training step on a stated cluster: a model of few numbers, calibrated on published runs. No torch.

Matrix products and attention take their operations over the shares of the peak that the profile states; element-wise
work, the loss and the update take the bytes that they move over the memory's bandwidth; traffic takes its bytes over
the bandwidth of the slowest link of its group. Tensor- and context-parallel traffic, and ZeRO 0 to 2's, is waited for;
ZeRO-3's runs beside computation, as DeepSpeed's default is (`overlap_comm`), and counts where it takes longer.
"""

from __future__ import annotations

from dataclasses import dataclass

from megazebra.config.checks import gradient_accumulation_steps
from megazebra.config.schema import Config
from megazebra.context.choice import layer_shape, resolve_specs
from megazebra.parallel.traffic import TrafficCounter
from megazebra.plan.flops import attention_pairs, layer_matrix_weights, training_flops
from megazebra.plan.parameters import parameters
from megazebra.plan.profile import Profile
from megazebra.train.deepspeed_config import effective_zero_stage

_UPDATE_BYTES = 4 + 3 * 8  # of a weight: its gradient read; master weight and two moments read and written


@dataclass(frozen=True)
class StepTime:
    """Seconds by what they are spent on. waiting: for traffic."""

    products: float
    attention: float
    elementwise: float
    update: float
    waiting: float

    @property
    def total(self) -> float:
        return self.products + self.attention + self.elementwise + self.update + self.waiting


def crosses_nodes(group: str, config: Config, world_size: int, profile: Profile) -> bool:
    """Whether ranks of the group lie on different nodes: tp is the mesh's fastest axis, then cp."""
    spans = {"tp": config.parallel.tensor, "cp": config.parallel.tensor * config.parallel.context}
    return spans.get(group, world_size) > profile.devices_per_node


def step_time(config: Config, world_size: int, profile: Profile, traffic: TrafficCounter) -> StepTime:
    """traffic: of a step, as `step_traffic` gives it."""
    model, tensor, context = config.model, config.parallel.tensor, config.parallel.context
    micro_batches = gradient_accumulation_steps(config, world_size // (tensor * context))
    rows = micro_batches * config.train.micro_batch_size
    seq_len = layer_shape(config).seq_len
    tokens = rows * seq_len // context  # of a rank, in a step
    passes = 4 if config.train.recompute == "full" else 3  # backward counts twice

    weights = passes * model.num_layers * layer_matrix_weights(model) + 3 * model.hidden_size * model.vocab_size
    pairs = rows * sum(attention_pairs([seq_len], spec.window) for spec in resolve_specs(config)) / context
    attention_flops = passes * 4 * model.num_attention_heads * model.head_size * pairs / tensor
    peak = profile.peak_flops(config.train.precision)
    sharing = world_size // tensor
    share = sum(w.numel for w in parameters(model, tensor)) / (sharing if effective_zero_stage(config) else 1)
    products = 2 * weights * tokens / tensor / (peak * profile.matmul_share)
    attention = attention_flops / (peak * profile.attention_share)
    elementwise = tokens * _elementwise_bytes(config, passes) / profile.memory_bandwidth
    return StepTime(
        products,
        attention,
        elementwise,
        update=share * _UPDATE_BYTES / profile.memory_bandwidth,
        waiting=_waiting(config, world_size, profile, traffic, beside=products + attention + elementwise),
    )


def _elementwise_bytes(config: Config, passes: int) -> float:
    """Moved per token outside of products and attention.

    Forward: two norms and two sums of the residual stream read and write ten times its width, RoPE reads and writes
    queries and keys, SwiGLU's product reads two and writes one; backward takes twice that. Of logits six float32
    passes: maximum, exponentials, their sum, gradient.
    """
    model, tensor, element = config.model, config.parallel.tensor, 2 if config.train.precision == "bf16" else 4
    shards = tensor if config.parallel.sequence_parallel else 1
    heads = model.num_attention_heads + model.kv_heads
    numbers = 10 * model.hidden_size / shards + (2 * heads * model.head_size + 3 * model.ffn_hidden_size) / tensor
    return passes * model.num_layers * numbers * element + 6 * 4 * model.vocab_size / tensor


def _waiting(config: Config, world_size: int, profile: Profile, traffic: TrafficCounter, beside: float) -> float:
    seconds = {"zero": 0.0, "others": 0.0}
    for (group, _, _), tally in traffic.tallies.items():
        bandwidth = profile.intra_node_bandwidth
        if crosses_nodes(group, config, world_size, profile):
            # Rings enter a node through the ports of all its members.
            members = 1 if group == "cp" else max(1, profile.devices_per_node // config.parallel.tensor)
            bandwidth = min(bandwidth, members * profile.inter_node_bandwidth)
        whose = "zero" if group == "zero" else "others"
        seconds[whose] += tally.bytes / bandwidth + tally.calls * profile.latency_s
    zero = seconds["zero"]
    if effective_zero_stage(config) == 3:
        zero = max(0.0, zero - beside)
    return seconds["others"] + zero


def model_flops(config: Config) -> int:
    """Of a step on all ranks, by the convention of plan/flops.py: recomputation and padding are not counted."""
    return training_flops(config.model, [config.data.seq_len] * config.train.global_batch_size)
