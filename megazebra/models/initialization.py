"""Weights of a new model, and whole weights put into a sharded one.

Both are independent of the layout: a weight is drawn (or given) whole, and every rank keeps its part.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from megazebra.config.schema import ModelConfig
from megazebra.parallel.mesh import Group
from megazebra.parallel.sharding import full_shape, shard_of, unshard

Gathered = Callable[[list[nn.Parameter]], AbstractContextManager[object]]


def in_place(parameters: list[nn.Parameter]) -> AbstractContextManager[object]:
    """For weights that are where they seem to be; ZeRO-3's are gathered for writing by the engine's own."""
    return nullcontext()


@torch.no_grad()
def initialize(model: nn.Module, config: ModelConfig, seed: int, tp: Group, gathered: Gathered = in_place) -> None:
    """Fill every weight: normal with `init_std`, output projections scaled by 1/sqrt(2 layers) (GPT-2),
    norms one, biases and sinks zero. Each weight has a random stream of its own name, so neither the
    layout nor other weights change it.
    """
    for name, parameter in model.named_parameters():
        with gathered([parameter]):
            if name.endswith("norm.weight"):
                parameter.fill_(1)
            elif parameter.ndim == 1:
                parameter.zero_()
            else:
                std = config.init_std
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    std /= math.sqrt(2 * config.num_layers)
                generator = torch.Generator(parameter.device).manual_seed(seed << 32 | zlib.crc32(name.encode()))
                full = torch.empty(full_shape(parameter, parameter.shape), device=parameter.device)
                full.normal_(0, std, generator=generator)
                parameter.copy_(shard_of(full, parameter, parameter.shape, tp))


@torch.no_grad()
def load_full_weights(
    model: nn.Module, weights: Mapping[str, Tensor], tp: Group, gathered: Gathered = in_place
) -> None:
    """Copy whole weights (Hugging Face names) into the model's shards.

    A tied output layer may be absent. Raises ValueError on missing, unexpected or wrongly shaped weights,
    all named at once.
    """
    problems = [f"unexpected {name}" for name in sorted(set(weights) - set(_names(model)))]
    for name, parameter in model.named_parameters():
        with gathered([parameter]):
            wanted = full_shape(parameter, parameter.shape)
            if name not in weights:
                problems.append(f"missing {name}")
            elif weights[name].shape != wanted:
                problems.append(f"{name} has shape {tuple(weights[name].shape)}, the model needs {tuple(wanted)}")
            else:
                parameter.copy_(shard_of(weights[name].to(parameter.device), parameter, parameter.shape, tp))
    if problems:
        raise ValueError("weights do not fit the model: " + "; ".join(problems))


@torch.no_grad()
def full_weights(model: nn.Module, tp: Group, gathered: Gathered = in_place) -> dict[str, Tensor]:
    """Every weight whole, on this rank's memory (all ranks call it; for tests and small models)."""
    weights = {}
    for name, parameter in model.named_parameters():
        with gathered([parameter]):
            weights[name] = unshard(parameter.detach(), parameter, tp).clone()
    return weights


def _names(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters(remove_duplicate=False)]
