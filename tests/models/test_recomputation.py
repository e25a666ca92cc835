"""Activation recomputation changes what is kept and computed twice, and nothing else."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode
from zebras import make_model, random_tokens, small_config

from megazebra.attention.packing import Packing
from megazebra.config import ModelConfig
from megazebra.models.zebra import ZebraModel

MODES = ["none", "selective", "full"]
BATCH, LENGTH = 2, 32


def _product(_added: list[int], left: list[int], right: list[int], **_: Any) -> int:
    return 2 * math.prod(left) * right[-1]


IN_PLACE = {torch.ops.aten.addmm_: _product, torch.ops.aten.baddbmm_: _product}  # torch's counter misses these
CONFIG = small_config(attention_bias=True, mlp_bias=True, qk_norm=True, attention_sinks="local")


def _model(config: ModelConfig, mode: str, **options: Any) -> ZebraModel:
    return make_model(config, recompute=mode, loss_chunk=16, **options)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_loss_and_gradients_are_equal_bit_for_bit(tied: bool, packed: bool) -> None:
    config = CONFIG.model_copy(update={"tie_word_embeddings": tied})
    tokens, labels = random_tokens(config, BATCH, LENGTH)
    packing = Packing.from_document_lengths([[10, 22], [32]]) if packed else None
    results = []
    for mode in MODES:
        model = _model(config, mode)
        loss = model(tokens, labels, None, packing)
        loss.backward()
        results.append((loss, {name: parameter.grad for name, parameter in model.named_parameters()}))
    for loss, gradients in results[1:]:
        assert torch.equal(loss, results[0][0])
        for name, gradient in gradients.items():
            assert gradient is not None, name
            assert torch.equal(gradient, results[0][1][name]), name


def _flops(model: ZebraModel, tokens: Tensor, labels: Tensor | None) -> int:
    with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter:
        if labels is None:
            with torch.no_grad():
                model.model(tokens, torch.arange(LENGTH).expand(BATCH, LENGTH), None, LENGTH)
        else:
            model(tokens, labels).backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("backend", ["blocked", "reference"])
def test_matrix_products_done_again(backend: str) -> None:
    tokens, labels = random_tokens(CONFIG, BATCH, LENGTH)
    none, selective, full = (_flops(_model(CONFIG, mode, backend=backend), tokens, labels) for mode in MODES)
    assert selective == none
    # Full: the blocks' forward again, up to the last matrix product, whose output backward does not need.
    blocks = _flops(_model(CONFIG, "none", backend=backend), tokens, None)
    last = CONFIG.num_layers * 2 * BATCH * LENGTH * CONFIG.ffn_hidden_size * CONFIG.hidden_size
    assert full - none == blocks - last


def test_nothing_is_recomputed_without_gradients() -> None:
    tokens, labels = random_tokens(CONFIG, BATCH, LENGTH)
    with torch.no_grad():
        losses = {mode: _model(CONFIG, mode)(tokens, labels) for mode in MODES}
    assert losses["none"] == losses["selective"] == losses["full"]


def _kept_bytes(mode: str) -> int:
    """Memory that backward's tensors hold alive, weights and labels not counted."""
    model = _model(CONFIG, mode)
    tokens, labels = random_tokens(CONFIG, BATCH, LENGTH)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}  # holding them keeps an address from being used again

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if tensor.is_floating_point() and storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(tokens, labels)
    assert loss.requires_grad
    return sum(storage.nbytes() for storage in kept.values())


def test_memory_kept_for_backward() -> None:
    none, selective, full = (_kept_bytes(mode) for mode in MODES)
    assert none > selective > full
    tokens, width, layers = BATCH * LENGTH, CONFIG.ffn_hidden_size, CONFIG.num_layers
    # Selective keeps gate and up, and forms their product again.
    assert none - selective == layers * tokens * width * 4
    # Full keeps the input of each block, what the final norm needs (its input, one scale a token), and the loss's
    # two gradients.
    inputs = layers * tokens * CONFIG.hidden_size * 4
    norm = (CONFIG.hidden_size + 1) * tokens * 4
    loss = (tokens + CONFIG.vocab_size) * CONFIG.hidden_size * 4
    assert full <= inputs + norm + loss
