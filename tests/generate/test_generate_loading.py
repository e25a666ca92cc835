"""Models for inference come from model folders and from what training leaves, in the dtype asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hf.hf_models import save_ours
from models.zebras import random_tokens, small_config
from support.checkpoints import save_runs
from support.distributed import run_distributed
from support.training import tiny_config

from megazebra.checkpoint.store import CheckpointError
from megazebra.generate.loading import load_model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_folder(dtype: torch.dtype, tmp_path: Path) -> None:
    saved = save_ours(tmp_path / "model", tie_word_embeddings=True, attention_sinks="all")
    model = load_model(tmp_path / "model", "cpu", dtype, "blocked")
    assert not model.training
    assert model.lm_head.weight is model.model.embed_tokens.weight
    weights = dict(saved.named_parameters())
    assert weights.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, weights[name].to(dtype)), name
        assert not parameter.requires_grad
    assert torch.get_default_dtype() == torch.float32
    tokens, _ = random_tokens(small_config(), 2, 12)
    assert torch.equal(model(tokens), saved.to(dtype)(tokens).detach())


def test_a_run_and_one_of_its_checkpoints(tmp_path: Path) -> None:
    config = tiny_config(run__dir=str(tmp_path), parallel__tensor=2, train__precision="bf16", parallel__zero_stage=1)
    (truth,) = run_distributed(save_runs, 2, [config])[0]
    for path in (tmp_path, next(tmp_path.glob("checkpoints/step_*"))):
        model = load_model(path, "cpu", torch.float32)
        for name, parameter in model.named_parameters():
            # The master weights, not what bf16 has left of them.
            assert torch.equal(parameter, truth.states[name]["master"]), name


def test_what_is_no_model_or_cannot_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is no training checkpoint"):
        load_model(tmp_path, "cpu", torch.float32)
    save_ours(tmp_path / "model")
    with pytest.raises(ValueError, match="attention backend 'flash' was asked for but"):
        load_model(tmp_path / "model", "cpu", torch.float32, "flash")
