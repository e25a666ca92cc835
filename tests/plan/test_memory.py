"""What the planner's memory is made of. That it is right is measured: tests/tools/test_plan_tool.py."""

from __future__ import annotations

from typing import Any

import pytest

from megazebra.config.schema import Config
from megazebra.plan.memory import Memory, peak_memory
from megazebra.plan.parameters import parameters


def planned(devices: int = 8, **changes: Any) -> Memory:
    tree: dict[str, Any] = {
        "parallel": {"zero_stage": 1},
        "train": {"global_batch_size": 64},
        "data": {"seq_len": 4096},
    }
    for key, value in changes.items():
        section, name = key.split("__")
        tree[section][name] = value
    return peak_memory(Config.model_validate(tree), devices)


N = sum(weight.numel for weight in parameters(Config().model, 1))


@pytest.mark.parametrize(
    ("precision", "stage", "weights", "optimizer"),
    [("fp32", 0, 4, 8), ("fp32", 1, 4, 12 / 8), ("bf16", 1, 2, 12 / 8), ("bf16", 2, 2, 12 / 8)],
)
def test_states_by_stage(precision: str, stage: int, weights: float, optimizer: float) -> None:
    memory = planned(train__precision=precision, parallel__zero_stage=stage)
    assert memory.weights == weights * N
    assert memory.optimizer == pytest.approx(optimizer * N, rel=1e-6)


def test_a_stage_more_needs_less_at_rest() -> None:
    states = [planned(parallel__zero_stage=stage) for stage in (1, 2, 3)]
    at_rest = [each.weights + each.gradients + each.optimizer for each in states]
    assert at_rest == sorted(at_rest, reverse=True)
    assert at_rest[2] < at_rest[0] / 3


def test_recomputation_and_sharding_shrink_activations() -> None:
    plain = planned(devices=16)
    selective = planned(devices=16, train__recompute="selective")
    full = planned(devices=16, train__recompute="full")
    assert full.activations < selective.activations < plain.activations
    # Selective leaves out one of SwiGLU's three tensors, of all layers.
    model = Config().model
    assert plain.activations - selective.activations == model.num_layers * 4096 * model.ffn_hidden_size * 2
    shared = planned(devices=16, parallel__tensor=2, parallel__sequence_parallel=True)
    assert shared.activations < 0.52 * plain.activations
    split = planned(devices=16, parallel__context=2)
    # A halo and the output that is put together from two come on top of the half.
    assert 0.5 * plain.activations < split.activations < 0.6 * plain.activations


def test_logits_exist_for_one_chunk() -> None:
    short, long = (planned(train__loss_chunk=1024, data__seq_len=length).loss for length in (2048, 4096))
    assert short == long
