"""The sides of tools/bench_train.py: one model in three ways, each with its own plain training step.

Shapes: B = 1 batch, S sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.dtypes import DTYPES
from bench.measure import peak_bytes, wall_seconds
from megazebra.config.schema import Config, ModelConfig, TrainConfig
from megazebra.labels import IGNORE_INDEX
from megazebra.models.build import build_model, model_runtime
from megazebra.models.initialization import initialize
from megazebra.models.zebra import ZebraModel
from megazebra.parallel.mesh import ParallelMesh

SEED = 1234


@dataclass(frozen=True)
class Setting:
    """The model and the step; `threads` are those of one process."""

    seq_len: int
    layers: int
    hidden: int
    heads: int
    window: int
    vocab: int
    pattern: str
    dtype: Literal["fp32", "bf16"]
    threads: int
    backend: str

    def config(self) -> Config:
        return Config(
            model=ModelConfig(
                num_layers=self.layers,
                hidden_size=self.hidden,
                # Llama's 8/3 of the width, in multiples of 32.
                ffn_hidden_size=-(-self.hidden * 8 // 3 // 32) * 32,
                num_attention_heads=self.heads,
                vocab_size=self.vocab,
                max_position_embeddings=self.seq_len,
                pattern=self.pattern,
                window=self.window,
            ),
            train=TrainConfig(precision=self.dtype, attention_backend=self.backend),
        )

    def tokens(self) -> Tensor:
        """int64 [1, S]; every token but the first is a label."""
        return torch.randint(self.vocab, (1, self.seq_len), generator=torch.Generator().manual_seed(SEED))


class Side:
    """A model, its AdamW and what one training step is; `loss` gives the mean over the labels."""

    def __init__(self, model: nn.Module, loss: Callable[[], Tensor]) -> None:
        self.loss = loss
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.1, fused=True)

    def step(self) -> float:
        loss = self.loss()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    def make_moments(self) -> None:
        """An update without gradients: AdamW has its moments from the first one on."""
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad()


def ours(setting: Setting) -> Side:
    model, tokens = zebra(setting), setting.tokens()
    labels = F.pad(tokens[:, 1:], (0, 1), value=IGNORE_INDEX)
    return Side(model, lambda: model(tokens, labels) / (setting.seq_len - 1))


def full_pattern(setting: Setting) -> Side:
    return ours(replace(setting, pattern="G"))


def transformers(setting: Setting) -> Side:
    """Hugging Face's model of this kind with the same weights; it shifts the labels itself."""
    from transformers import CwmConfig, CwmForCausalLM

    config = setting.config().model
    specs = config.attention_specs()
    model = CwmForCausalLM(
        CwmConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.ffn_hidden_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.kv_heads,
            head_dim=config.head_size,
            max_position_embeddings=config.max_position_embeddings,
            rms_norm_eps=config.rms_norm_eps,
            # A bare rope_theta would be overridden by the class's own scaling.
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_global.theta},
            sliding_window=config.window,
            layer_types=["sliding_attention" if spec.is_local else "full_attention" for spec in specs],
            tie_word_embeddings=config.tie_word_embeddings,
            bos_token_id=1,
            eos_token_id=2,
            attn_implementation="sdpa",
        )
    ).to(DTYPES[setting.dtype])
    model.load_state_dict(zebra(setting).state_dict())
    model.train()
    tokens = setting.tokens()
    return Side(model, lambda: model(tokens, labels=tokens, use_cache=False).loss)


SIDES: dict[str, Callable[[Setting], Side]] = {
    "ours": ours,
    "full_pattern": full_pattern,
    "transformers": transformers,
}


def zebra(setting: Setting) -> ZebraModel:
    """As pretraining builds it, with the same weights whatever the pattern and without an engine around it."""
    config = setting.config()
    mesh = ParallelMesh.build(config.parallel)
    model = build_model(config, mesh, model_runtime(config, torch.device("cpu")))
    initialize(model, config.model, SEED, mesh.tp)
    return model.to(DTYPES[setting.dtype])


class Turn(NamedTuple):
    """loss: of the first step, before any update. seconds: wall time of the second."""

    loss: float
    seconds: float


def take_turn(name: str, setting: Setting) -> Turn:
    torch.set_num_threads(setting.threads)
    side = SIDES[name](setting)
    return Turn(side.step(), wall_seconds(side.step))


def peak_of_training(name: str, setting: Setting) -> int:
    """Bytes that the model, its optimizer and a step add to a process that holds the libraries already."""
    torch.set_num_threads(setting.threads)
    small = replace(setting, seq_len=64, layers=1, pattern=setting.pattern[:1], window=16)
    SIDES[name](small).step()

    def train() -> None:
        side = SIDES[name](setting)
        side.make_moments()
        side.step()

    return peak_bytes(train)
