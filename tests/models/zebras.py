"""Small models for the tests of this folder, their weights random everywhere (also norms, biases, sinks)."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megazebra.attention.backend import resolve_backend
from megazebra.config import ModelConfig, ParallelConfig
from megazebra.labels import IGNORE_INDEX
from megazebra.models.initialization import load_full_weights
from megazebra.models.runtime import ModelRuntime
from megazebra.models.zebra import ZebraModel
from megazebra.parallel.mesh import ParallelMesh
from megazebra.parallel.sharding import full_shape
from megazebra.pattern import AttentionSpec

CPU = torch.device("cpu")
SMALL: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 32,
    "ffn_hidden_size": 40,
    "num_attention_heads": 4,
    "num_kv_heads": 2,
    "vocab_size": 61,
    "max_position_embeddings": 64,
    "pattern": "GLLL",
    "window": 5,
}


def small_config(**changes: Any) -> ModelConfig:
    return ModelConfig.model_validate(SMALL | changes)


def make_model(
    config: ModelConfig,
    mesh: ParallelMesh | None = None,
    specs: Sequence[AttentionSpec] | None = None,
    *,
    backend: str = "blocked",
    dtype: torch.dtype = torch.float32,
    **runtime: Any,
) -> ZebraModel:
    """A model with random weights, the same whatever the mesh."""
    mesh = mesh or ParallelMesh.build(ParallelConfig())
    choice = resolve_backend(
        backend, config.attention_specs(), head_dim=config.head_size, dtype=torch.float32, device=CPU
    )
    model = ZebraModel(config, mesh, ModelRuntime(backend=choice, **runtime), specs).to(dtype)
    load_full_weights(model, random_weights(model), mesh.tp)
    return model


def random_weights(model: ZebraModel) -> dict[str, Tensor]:
    weights = {}
    for name, parameter in model.named_parameters():
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        full = torch.randn(full_shape(parameter, parameter.shape), generator=generator, dtype=torch.float64)
        # Of a size that keeps activations near one and attention neither uniform nor one-hot.
        scale = full.shape[-1] ** -0.5 if full.ndim == 2 else 0.3
        weights[name] = full * scale + name.endswith("norm.weight")
    return weights


def random_tokens(config: ModelConfig, batch: int, length: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Tokens and labels [batch, length]; a sixth of the labels do not count."""
    generator = torch.Generator().manual_seed(seed)
    tokens, labels = torch.randint(0, config.vocab_size, (2, batch, length), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 1 / 6] = IGNORE_INDEX
    return tokens, labels
