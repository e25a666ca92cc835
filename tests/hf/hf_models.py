"""Small models for the tests of this folder: of transformers with random weights, and of ours as model folders."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from models.zebras import make_model, small_config
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from megazebra.checkpoint.model_folder import ModelFolder, ModelFolderWriter
from megazebra.models.initialization import load_full_weights
from megazebra.models.zebra import ZebraModel

TOKEN_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}


@torch.no_grad()
def save_theirs(config: PretrainedConfig, folder: Path, **saving: Any) -> PreTrainedModel:
    """A model of transformers with random weights everywhere, saved as transformers saves."""
    config = copy.deepcopy(config)  # the model changes it, and a case is used more than once
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        scale = parameter.shape[-1] ** -0.5 if parameter.ndim == 2 else 0.3
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale + name.endswith("norm.weight"))
    model.save_pretrained(folder, **saving)
    return model


def load_theirs(folder: Path, **loading: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, **loading).eval()


def edit_config(folder: Path, **changes: Any) -> None:
    """Change fields of config.json; `...` removes one."""
    path = folder / "config.json"
    fields = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in fields.items() if value is not ...}))


def save_ours(folder: Path, **changes: Any) -> ZebraModel:
    """A model of ours with random weights, as a model folder."""
    config = small_config(**changes)
    model = make_model(config)
    with ModelFolderWriter(folder, config) as writer:
        for name, parameter in model.named_parameters():
            writer.write(name, parameter)
    return model


def load_ours(folder: Path) -> ZebraModel:
    source = ModelFolder.open(folder)
    model = make_model(source.config)
    load_full_weights(model, {name: source.tensor(name) for name in source.names}, model.mesh.tp)
    return model


@torch.no_grad()
def logits(model: PreTrainedModel | ZebraModel, tokens: Tensor) -> Tensor:
    return model(tokens) if isinstance(model, ZebraModel) else model(tokens, use_cache=False).logits
