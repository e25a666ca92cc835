"""The update rules, made refusable: DeepSpeed drives them, and a bad step must not reach the weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from megazebra.config.schema import OptimizerConfig


class _Refusable:
    """`refuses()` is asked before every update; True leaves weights and moments as they are.

    This is the one place every ZeRO stage passes with the final gradient norm known and the weights not
    yet touched, so a skipped step needs no knowledge of the stage.
    """

    refuses: Callable[[], bool] = staticmethod(lambda: False)

    def step(self, closure: Any = None) -> Any:
        return None if self.refuses() else super().step(closure)  # type: ignore[misc]


class RefusableAdamW(_Refusable, torch.optim.AdamW):
    pass


class RefusableSGD(_Refusable, torch.optim.SGD):
    pass


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices with weight decay; norms, biases and sinks (one-dimensional) without."""
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for parameter in model.parameters():
        # ZeRO-3 leaves a flat shard in place of the parameter and keeps its shape aside.
        shape = getattr(parameter, "ds_shape", parameter.shape)
        groups[len(shape) > 1].append(parameter)
    return [
        {"params": parameters, "weight_decay": weight_decay if decays else 0.0}
        for decays, parameters in groups.items()
        if parameters
    ]


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> RefusableAdamW | RefusableSGD:
    """AdamW (Loshchilov and Hutter 2019, torch's fused kernel) or SGD with decoupled parameter groups."""
    groups = parameter_groups(model, config.weight_decay)
    if config.name == "sgd":
        return RefusableSGD(groups, lr=config.lr, momentum=config.momentum)
    return RefusableAdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
