"""Weights of a new model, and whole weights put into a sharded one.

Both are independent of the layout: a weight is drawn (or given) whole, and every rank keeps its part.
"""

from __future__ import annotations

import hashlib
import math
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
                generator = torch.Generator(parameter.device).manual_seed(_stream(seed, name))
                full = torch.empty(full_shape(parameter, parameter.shape), device=parameter.device)
                full.normal_(0, std, generator=generator)
                parameter.copy_(shard_of(full, parameter, parameter.shape, tp))


@torch.no_grad()
def load_full_weights(
    model: nn.Module, weights: Mapping[str, Tensor], tp: Group, gathered: Gathered = in_place
) -> None:
    """Copy whole weights (Hugging Face names) into the model's shards.

    A tied output layer may be absent. Raises ValueError on missing, unexpected or wrongly shaped weights and
    on a tied output layer with values of its own, all named at once.
    """
    first_names, problems = _first_names(model), []
    for name in sorted(weights):
        first = first_names.get(name)
        if first is None:
            problems.append(f"unexpected {name}")
        elif name != first and first in weights and not torch.equal(weights[name], weights[first]):
            problems.append(f"{name} differs from {first}; set model.tie_word_embeddings=false to keep both")
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


def _stream(seed: int, name: str) -> int:
    """A seed of 32 bits: torch's generator on CPU ignores the higher ones."""
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:4], "little")


def _first_names(model: nn.Module) -> dict[str, str]:
    """For every name of a parameter the one that `named_parameters` gives; tied weights have two names."""
    first: dict[nn.Parameter, str] = {}
    return {name: first.setdefault(p, name) for name, p in model.named_parameters(remove_duplicate=False)}
