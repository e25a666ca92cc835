"""A global layer learns to copy from beyond every window; local layers alone cannot."""

from __future__ import annotations

import torch
from torch import Tensor
from zebras import make_model

from megazebra.config import ModelConfig
from megazebra.labels import IGNORE_INDEX
from megazebra.models.initialization import initialize
from megazebra.models.zebra import ZebraModel

VOCABULARY, HALF, WINDOW, LAYERS = 32, 64, 8, 4
STEPS, BATCH, LEARNING_RATE, WARMUP = 120, 8, 6e-3, 20


def _sequences(generator: torch.Generator, batch: int) -> tuple[Tensor, Tensor]:
    """Random tokens, then the same again. Labels: the second half, each 63 positions after the token to copy."""
    half = torch.randint(0, VOCABULARY, (batch, HALF), generator=generator)
    tokens = torch.cat([half, half], dim=1)
    labels = torch.full_like(tokens, IGNORE_INDEX)
    labels[:, HALF - 1 : -1] = half
    return tokens, labels


def _learn(pattern: str, seed: int) -> ZebraModel:
    config = ModelConfig(
        num_layers=LAYERS,
        hidden_size=64,
        ffn_hidden_size=128,
        num_attention_heads=4,
        vocab_size=VOCABULARY,
        max_position_embeddings=2 * HALF,
        pattern=pattern,
        window=WINDOW,
        init_std=0.05,
    )
    model = make_model(config)
    initialize(model, config, seed, model.mesh.tp)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(seed)
    for step in range(STEPS):
        tokens, labels = _sequences(generator, BATCH)
        loss = model(tokens, labels) / (BATCH * HALF)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        decay = 1 - max(0.0, step / STEPS - 0.6) * 2
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * min(1.0, (step + 1) / WARMUP) * decay
        optimizer.step()
    return model


@torch.no_grad()
def _accuracy(model: ZebraModel) -> float:
    tokens, labels = _sequences(torch.Generator().manual_seed(99), 32)
    asked = labels != IGNORE_INDEX
    return (model(tokens).argmax(-1) == labels)[asked].float().mean().item()


def test_one_global_layer_in_four_copies() -> None:
    assert _accuracy(_learn("GLLL", seed=1)) > 0.95


def test_local_layers_stay_at_chance() -> None:
    # Four windows of 8 reach back 28 positions, the token to copy is 63 back. Chance is 3 %.
    assert LAYERS * (WINDOW - 1) < HALF - 1
    assert _accuracy(_learn("LLLL", seed=1)) < 0.10
