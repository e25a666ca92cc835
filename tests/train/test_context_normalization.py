"""The engine's arithmetic over dp x cp ranks, before any strategy of context parallelism exists.

A model without attention treats every token alone, so slicing sequences over cp ranks must change nothing:
the loss is normalized by the global number of valid tokens and gradients are summed over all ranks. Adam would
hide a constant factor in the gradients, SGD does not.
"""

from __future__ import annotations

import pytest
import torch
from support.distributed import run_distributed
from support.training import CPU, step_batches, tiny_config
from torch import Tensor, nn

from megazebra.config.schema import Config, ParallelConfig
from megazebra.data.batch import MicroBatch
from megazebra.models.initialization import full_weights, initialize
from megazebra.parallel.cross_entropy import VocabParallelHead
from megazebra.parallel.linear import VocabParallelEmbedding
from megazebra.parallel.mesh import ParallelMesh
from megazebra.train.deepspeed_config import deepspeed_config
from megazebra.train.engine import TrainEngine, start_deepspeed
from megazebra.train.schedule import learning_rate

STEPS = 4


class BigramModel(nn.Module):
    def __init__(self, config: Config, mesh: ParallelMesh) -> None:
        super().__init__()
        size = config.model.hidden_size
        self.embed_tokens = VocabParallelEmbedding(config.model.vocab_size, size, mesh.tp, sequence_parallel=False)
        self.lm_head = VocabParallelHead(config.model.vocab_size, size, mesh.tp, chunk=16)

    def forward(self, tokens_BS: Tensor, labels_BS: Tensor) -> Tensor:
        return self.lm_head(self.embed_tokens(tokens_BS), labels_BS)


def forward(module: nn.Module, batch: MicroBatch) -> Tensor:
    return module(batch.tokens_BS, batch.labels_BS)


def config_for(stage: int) -> Config:
    return tiny_config(
        optimizer__name="sgd",
        optimizer__lr=1.0,
        optimizer__grad_clip=0.0,
        optimizer__weight_decay=0.0,
        parallel__zero_stage=stage,
        train__steps=STEPS,
        train__micro_batch_size=1,
    )


def train_over_cp(configs: list[Config], cp: int) -> list[tuple[list[float], dict[str, Tensor]]]:
    start_deepspeed(CPU, timeout_s=60)
    results = []
    for config in configs:
        mesh = ParallelMesh.build(ParallelConfig(context=cp))
        generated = deepspeed_config(config, mesh.dp.size)
        engine = TrainEngine(config, mesh, CPU, generated, lambda c=config, m=mesh: BigramModel(c, m), forward)
        losses = []
        for step in range(STEPS):
            batches = step_batches(config, step, mesh.dp.rank, mesh.dp.size)
            batches = [batch.context_slice(mesh.cp.rank, mesh.cp.size) for batch in batches]
            losses.append(engine.train_step(batches, step).loss)
        results.append((losses, full_weights(engine.module, mesh.tp, engine.gathered)))
        engine.deepspeed.destroy()
    return results


def train_plainly() -> tuple[list[float], dict[str, Tensor]]:
    config = config_for(0)
    mesh = ParallelMesh.build(ParallelConfig())
    model = BigramModel(config, mesh)
    initialize(model, config.model, config.train.seed, mesh.tp)
    model.double()
    losses = []
    for step in range(STEPS):
        batches = step_batches(config, step, 0, 1)
        loss = sum(forward(model, batch) for batch in batches) / sum(batch.valid_tokens for batch in batches)
        losses.append(loss.item())
        lr = learning_rate(step, STEPS, config.optimizer, config.schedule)
        with torch.no_grad():
            for parameter, grad in zip(model.parameters(), torch.autograd.grad(loss, model.parameters()), strict=True):
                parameter -= lr * grad
    return losses, {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize(("dp", "cp"), [(1, 2), (2, 2)])
def test_sgd_over_context_ranks_equals_the_plain_loop(dp: int, cp: int) -> None:
    losses, weights = train_plainly()
    for stage, (found, found_weights) in enumerate(
        run_distributed(train_over_cp, dp * cp, [config_for(stage) for stage in range(4)], cp)[0]
    ):
        # Sums of at most 61 x 64 products: tens of float32 roundings (6e-8) of numbers below 5.
        assert found == pytest.approx(losses, abs=2e-6), f"ZeRO {stage}"
        for name, expected in weights.items():
            torch.testing.assert_close(found_weights[name].double(), expected, rtol=0, atol=2e-6, msg=f"{stage} {name}")


def test_context_slices_join_to_the_whole() -> None:
    (batch, *_) = step_batches(config_for(0), 0, 0, 1)
    parts = [batch.context_slice(rank, 4) for rank in range(4)]
    for field in ("tokens_BS", "labels_BS", "positions_BS"):
        joined = torch.cat([getattr(part, field) for part in parts], dim=1)
        torch.testing.assert_close(joined, getattr(batch, field), rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"32 tokens are not divisible by parallel.context=5"):
        batch.context_slice(0, 5)
