"""The planner's weights are the model's, rank by rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from megazebra.config import ModelConfig, ParallelConfig
from megazebra.models.runtime import ModelRuntime
from megazebra.models.zebra import ZebraModel
from megazebra.parallel.mesh import ParallelMesh
from megazebra.plan.parameters import parameters

SMALL: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 32,
    "ffn_hidden_size": 40,
    "num_attention_heads": 8,
    "num_kv_heads": 4,
    "vocab_size": 61,  # divisible by nothing: padded
    "pattern": ("G", 3, "L", "L"),
}
EVERYTHING = {"attention_bias": True, "mlp_bias": True, "qk_norm": True, "attention_sinks": "local"}


@pytest.mark.parametrize("tensor", [1, 2, 4])
@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True, "head_dim": 6}, EVERYTHING])
def test_names_and_shapes_are_the_models(changes: dict[str, Any], tensor: int) -> None:
    config = ModelConfig.model_validate(SMALL | changes)
    dist.init_process_group("fake", rank=tensor - 1, world_size=tensor, store=FakeStore())
    try:
        with torch.device("meta"):
            model = ZebraModel(config, ParallelMesh.build(ParallelConfig(tensor=tensor)), ModelRuntime(backend=None))
    finally:
        dist.destroy_process_group()
    own = [(parameter.name, parameter.shape) for parameter in parameters(config, tensor)]
    assert own == [(name, tuple(weight.shape)) for name, weight in model.named_parameters()]
