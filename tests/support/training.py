"""Tiny models and batches, trained under any layout and by a plain torch loop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megazebra.config.schema import Config
from megazebra.context.choice import sequence_multiple
from megazebra.data.batch import MicroBatch, collate
from megazebra.data.index.boundaries import document_positions
from megazebra.data.samples import Sample
from megazebra.labels import IGNORE_INDEX
from megazebra.models.build import build_model, forward, model_runtime
from megazebra.models.initialization import full_weights, initialize
from megazebra.parallel.mesh import ParallelMesh
from megazebra.train.deepspeed_config import deepspeed_config
from megazebra.train.engine import TrainEngine, start_deepspeed
from megazebra.train.schedule import learning_rate

CPU = torch.device("cpu")

TINY: dict[str, Any] = {
    "model": {
        "num_layers": 4,
        "hidden_size": 64,
        "ffn_hidden_size": 96,
        "num_attention_heads": 8,
        "num_kv_heads": 4,
        "vocab_size": 61,  # divisible by nothing: every tensor-parallel size pads
        "max_position_embeddings": 64,
        "pattern": "GLLL",
        "window": 5,
    },
    "train": {
        "steps": 10,
        "micro_batch_size": 1,
        "global_batch_size": 4,
        "precision": "fp32",
        "loss_chunk": 24,
        "guard": {"enabled": False},
    },
    "optimizer": {"lr": 1e-2, "grad_clip": 1.0},
    "schedule": {"kind": "cosine", "warmup_steps": 2},
    "data": {"seq_len": 32},
    "parallel": {"zero_stage": 0},
}


def tiny_config(**dotted: Any) -> Config:
    """TINY with changes such as `parallel__tensor=2` (two underscores for a dot)."""
    tree: dict[str, Any] = {section: dict(keys) for section, keys in TINY.items()}
    for key, value in dotted.items():
        section, name = key.split("__", 1)
        tree.setdefault(section, {})[name] = value
    return Config.model_validate(tree)


class RandomSamples:
    """Samples of random tokens in documents of random lengths; some labels do not count, so that ranks
    have unequal numbers of valid tokens."""

    samples_per_epoch = 1 << 20

    def __init__(self, vocab_size: int, seq_len: int) -> None:
        self.vocab_size = vocab_size
        self.seq_len = seq_len

    def __getitem__(self, index: int) -> Sample:
        random = np.random.default_rng(index)
        tokens = random.integers(0, self.vocab_size, self.seq_len + 1)
        cuts = np.sort(random.choice(np.arange(1, self.seq_len), size=index % 3, replace=False))
        lengths = np.diff([0, *cuts, self.seq_len + 1]).tolist()
        mask = random.random(self.seq_len) < (0.3 if index % 2 else 0.9)
        labels = tokens[1:].copy()
        labels[np.cumsum(lengths[:-1], dtype=np.int64) - 1] = IGNORE_INDEX
        labels[~mask] = IGNORE_INDEX
        *whole, last = lengths
        lengths = [*whole, last - 1] if last > 1 else whole
        return Sample(tokens[:-1], labels, document_positions(lengths), lengths, index)


def step_batches(config: Config, step: int, dp_rank: int, dp_size: int) -> list[MicroBatch]:
    samples = RandomSamples(config.model.vocab_size, config.data.seq_len)
    share = config.train.global_batch_size // dp_size
    micro = config.train.micro_batch_size
    first = step * config.train.global_batch_size + dp_rank * share
    return [
        collate([samples[i] for i in range(start, start + micro)], document_mask=config.data.document_mask)
        for start in range(first, first + share, micro)
    ]


@dataclass
class Trajectory:
    losses: list[float]
    grad_norms: list[float]
    weights: dict[str, Tensor]


def distance(run: Trajectory, reference: Trajectory) -> tuple[float, float, float]:
    """Largest differences: of losses, of gradient norms (relative), of parameters."""
    assert run.weights.keys() == reference.weights.keys()
    assert len(run.losses) == len(reference.losses)
    return (
        max(abs(a - b) for a, b in zip(run.losses, reference.losses, strict=True)),
        max(abs(a - b) / b for a, b in zip(run.grad_norms, reference.grad_norms, strict=True)),
        max((run.weights[name].double() - reference.weights[name].double()).abs().max().item() for name in run.weights),
    )


def make_engine(config: Config) -> TrainEngine:
    mesh = ParallelMesh.build(config.parallel)
    runtime = model_runtime(config, CPU)
    return TrainEngine(
        config,
        mesh,
        CPU,
        deepspeed_config(config, mesh.dp.size),
        build_model=lambda: build_model(config, mesh, runtime),
        forward=forward,
    )


def run_steps(engine: TrainEngine, config: Config, steps: range) -> tuple[list[float], list[float]]:
    losses, norms = [], []
    for step in steps:
        cp = engine.mesh.cp
        batches = [
            batch.padded(sequence_multiple(config)).context_slice(cp.rank, cp.size)
            for batch in step_batches(config, step, engine.mesh.dp.rank, engine.mesh.dp.size)
        ]
        result = engine.train_step(batches, step)
        losses.append(result.loss)
        norms.append(result.grad_norm)
    return losses, norms


def train_under_deepspeed(configs: list[Config]) -> list[Trajectory]:
    """One run after another on the same ranks (called on every rank)."""
    start_deepspeed(CPU, timeout_s=120)
    trajectories = []
    for config in configs:
        engine = make_engine(config)
        losses, norms = run_steps(engine, config, range(config.train.steps))
        weights = full_weights(engine.module, engine.mesh.tp, engine.gathered)
        trajectories.append(Trajectory(losses, norms, weights))
        engine.deepspeed.destroy()
    return trajectories


def train_plainly(
    config: Config,
    dtype: torch.dtype = torch.float32,
    first_step: int = 0,
    state: dict[str, dict[str, Tensor]] | None = None,
) -> Trajectory:
    """The same training in one process with nothing but torch: no mesh, no engine, no accumulation tricks.

    bfloat16 keeps float32 master weights, as every mixed-precision trainer does.
    state: what `first_step` begins with: of every weight its 'master', and AdamW's moments by their names.
    """
    mesh = ParallelMesh.build(tiny_config().parallel)
    model = build_model(config, mesh, model_runtime(config, CPU))
    initialize(model, config.model, config.train.seed, mesh.tp)
    model.to(dtype)
    names, parameters = zip(*model.named_parameters(), strict=True)
    masters = [p.detach().float() if dtype == torch.bfloat16 else p for p in parameters]
    groups = [
        {"params": [m for m in masters if m.ndim > 1], "weight_decay": config.optimizer.weight_decay},
        {"params": [m for m in masters if m.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer: torch.optim.Optimizer
    if config.optimizer.name == "sgd":
        optimizer = torch.optim.SGD(groups, lr=1.0)
    else:
        optimizer = torch.optim.AdamW(groups, lr=1.0, betas=config.optimizer.betas, eps=config.optimizer.eps)
    for name, parameter, master in zip(names, parameters, masters, strict=True):
        if state is not None:
            moments = {what: value.to(master.dtype, copy=True) for what, value in state[name].items()}
            master.data.copy_(moments.pop("master"))
            parameter.data.copy_(master)
            optimizer.state[master] = {"step": torch.tensor(float(first_step)), **moments}
    losses, norms = [], []
    for step in range(first_step, config.train.steps):
        (batch,) = step_batches(
            config.model_copy(
                update={"train": config.train.model_copy(update={"micro_batch_size": config.train.global_batch_size})}
            ),
            step, 0, 1,
        )  # fmt: skip
        loss = forward(model, batch) / batch.valid_tokens
        for master, grad in zip(masters, torch.autograd.grad(loss, parameters), strict=True):
            master.grad = grad.to(master.dtype)
        norms.append(float(torch.nn.utils.clip_grad_norm_(masters, config.optimizer.grad_clip)))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config.train.steps, config.optimizer, config.schedule)
        optimizer.step()
        with torch.no_grad():
            for parameter, master in zip(parameters, masters, strict=True):
                parameter.copy_(master)
        losses.append(loss.item())
    return Trajectory(losses, norms, {name: m.detach().clone() for name, m in zip(names, masters, strict=True)})
