"""Checkpoints of tiny runs, and what a reader must find in them, gathered over the ranks by DeepSpeed and the model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from torch import Tensor, nn

from megazebra.checkpoint.manager import Checkpoints, Progress
from megazebra.config.schema import Config
from megazebra.models.initialization import full_weights
from megazebra.parallel.sharding import unshard
from megazebra.train.engine import TrainEngine, start_deepspeed
from support.training import CPU, make_engine, run_steps

STEPS = 2


@dataclass
class Truth:
    """Whole tensors by name: the model's weights in the run's precision, and what the optimizer has of each."""

    weights: dict[str, Tensor]
    states: dict[str, dict[str, Tensor]]


def save_runs(configs: list[Config]) -> list[Truth]:
    """Train each configuration for STEPS steps and save it in its run.dir (called on every rank)."""
    start_deepspeed(CPU, timeout_s=60)
    found = []
    for config in configs:
        engine = make_engine(config)
        run_steps(engine, config, range(STEPS))
        checkpoints = Checkpoints(config, engine, {})
        checkpoints.save(Progress(STEPS, STEPS * 4, STEPS * 128))
        checkpoints.completed(wait=True)
        found.append(truth(engine))
        engine.deepspeed.destroy()
    return found


def truth(engine: TrainEngine) -> Truth:
    states = {
        name: {
            what: unshard(_own_shard(engine, parameter, what), parameter, engine.mesh.tp).clone()
            for what in ("master", "exp_avg", "exp_avg_sq")
        }
        for name, parameter in engine.module.named_parameters()
    }
    return Truth(full_weights(engine.module, engine.mesh.tp, engine.gathered), states)


def _own_shard(engine: TrainEngine, parameter: nn.Parameter, what: str) -> Tensor:
    """Of this tensor-parallel rank; put together over data-parallel ranks by DeepSpeed."""
    shape = getattr(parameter, "ds_shape", parameter.shape)
    if engine.zero_stage == 0:
        value = parameter.detach() if what == "master" else engine.optimizer.state[parameter][what]
    elif what == "master":
        value = safe_get_full_fp32_param(parameter)
    else:
        if engine.zero_stage < 3 and (mapping := parameter._hp_mapping):  # type: ignore[attr-defined]
            # DeepSpeed looks for the moments before the first step, when there are none, and never again.
            outer = engine.deepspeed.optimizer
            buffers = getattr(outer, "single_partition_of_fp32_groups", None) or outer.fp32_groups_flat_partition
            buffer = buffers[mapping.param_group_index]
            mapping.set_optim_state_fragment(buffer, engine.optimizer.state[buffer])
        value = safe_get_full_optimizer_state(parameter, what)
    return value.to(torch.float32).view(shape)
