"""What a token can influence: exactly what pattern, window and documents allow."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from zebras import make_model, random_tokens, small_config

from megazebra.attention.packing import Packing
from megazebra.config import RopeConfig
from megazebra.models.zebra import ZebraModel

LENGTH, PERTURBED = 40, 9
BACKENDS = pytest.mark.parametrize("backend", ["blocked", "reference"])


def _changed(model: ZebraModel, tokens: Tensor, position: int, packing: Packing | None = None) -> list[list[int]]:
    """For each row, the positions whose logits another token at `position` of row 0 changes, in any bit."""
    other = tokens.clone()
    other[0, position] = (other[0, position] + 1) % 61
    with torch.no_grad():
        difference = model(other, None, None, packing) != model(tokens, None, None, packing)
    return [row.any(-1).nonzero().flatten().tolist() for row in difference]


# The furthest position a token reaches: a layer with window w carries it w - 1 on.
@BACKENDS
@pytest.mark.parametrize(
    ("pattern", "window", "reach"),
    [
        ("LLLL", 5, 4 * 4),
        ("LLLL", 1, 0),
        ("LLLL", 2, 4),
        ((3, 2, 5, 1), 4, 2 + 1 + 4 + 0),
        ((3, "L", "L", 1), 4, 2 + 3 + 3 + 0),
        ("GLLL", 5, LENGTH),
        ("LLLG", 5, LENGTH),
        ("GGGG", 5, LENGTH),
    ],
)
def test_a_token_reaches_as_far_as_the_pattern_says(backend: str, pattern: Any, window: int, reach: int) -> None:
    # float64, in which no influence is too small to show.
    model = make_model(small_config(pattern=pattern, window=window), backend=backend, dtype=torch.float64)
    tokens, _ = random_tokens(small_config(), 2, LENGTH)
    last = min(PERTURBED + reach, LENGTH - 1)
    assert _changed(model, tokens, PERTURBED) == [list(range(PERTURBED, last + 1)), []]


@BACKENDS
@pytest.mark.parametrize("pattern", ["G", "GLLL", "LLLL"])
def test_documents_never_see_each_other(backend: str, pattern: str) -> None:
    model = make_model(small_config(pattern=pattern), backend=backend, dtype=torch.float64)
    tokens, _ = random_tokens(small_config(), 2, LENGTH)
    packing = Packing.from_document_lengths([[8, 11, 1, 20], [LENGTH]])
    for position, end in [(0, 8), (7, 8), (8, 19), (18, 19), (19, 20), (20, LENGTH)]:
        end = end if pattern != "LLLL" else min(end, position + 4 * 4 + 1)
        assert _changed(model, tokens, position, packing) == [list(range(position, end)), []]


@BACKENDS
def test_packed_documents_equal_documents_on_their_own(backend: str) -> None:
    """Also: positions restart, whether or not RoPE is there (global layers have none here)."""
    config = small_config(rope_global=RopeConfig(enabled=False), attention_sinks="all", attention_softcap=3.0)
    model = make_model(config, backend=backend, dtype=torch.float64)
    tokens, labels = random_tokens(config, 2, LENGTH)
    lengths = [[8, 11, 1, 20], [25, 15]]
    positions = torch.stack([torch.cat([torch.arange(length) for length in row]) for row in lengths])
    packing = Packing.from_document_lengths(lengths)
    packed = model(tokens, labels, positions, packing)
    gradients = torch.autograd.grad(packed, list(model.parameters()))
    alone = sum(
        model(row_tokens[None], row_labels[None])
        for row, row_lengths in enumerate(lengths)
        for row_tokens, row_labels in zip(tokens[row].split(row_lengths), labels[row].split(row_lengths), strict=True)
    )
    # float64 (1.1e-16), some thousand operations deep, on a loss of about 300.
    torch.testing.assert_close(packed, alone, rtol=1e-12, atol=0)
    for own, expected in zip(gradients, torch.autograd.grad(alone, list(model.parameters())), strict=True):
        torch.testing.assert_close(own, expected, rtol=0, atol=1e-12 * expected.abs().max().item())


def test_default_positions_count_from_zero() -> None:
    model = make_model(small_config())
    tokens, labels = random_tokens(small_config(), 2, LENGTH)
    assert torch.equal(model(tokens, labels), model(tokens, labels, torch.arange(LENGTH).expand(2, LENGTH)))


def test_every_token_loss() -> None:
    model = make_model(small_config(final_logit_softcap=5.0), dtype=torch.float64, loss_chunk=7)
    tokens, labels = random_tokens(small_config(), 2, LENGTH)
    losses = model(tokens, labels, reduction="none")
    assert losses.shape == labels.shape
    torch.testing.assert_close(losses.sum(), model(tokens, labels), rtol=1e-13, atol=0)
    assert model(tokens).abs().max() < 5
    log_probabilities = model(tokens).log_softmax(-1)
    expected = -log_probabilities.gather(-1, labels.clamp(min=0)[..., None])[..., 0].masked_fill(labels < 0, 0)
    torch.testing.assert_close(losses, expected, rtol=0, atol=1e-12)


def _layers_that_change(model: ZebraModel, other: ZebraModel, tokens: Tensor) -> list[bool]:
    """Whether each layer's attention gives another output for the same input under the other model."""
    differs = []
    positions = torch.arange(tokens.shape[1])[None]
    x = torch.randn(1, tokens.shape[1], 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for own, their, spec, their_spec in zip(
        model.model.layers, other.model.layers, model.model.specs, other.model.specs, strict=True
    ):
        out = own.self_attn(x, model.model._rope_table(spec.rope, positions, LENGTH), None)
        their_out = their.self_attn(x, other.model._rope_table(their_spec.rope, positions, LENGTH), None)
        differs.append(not torch.equal(out, their_out))
    return differs


@pytest.mark.parametrize(
    ("changes", "differs"),
    [
        ({"rope_global": RopeConfig(theta=1e6)}, [True, False, False, True]),
        ({"rope_local": RopeConfig(theta=500.0)}, [False, True, True, False]),
        ({"rope_global": RopeConfig(enabled=False)}, [True, False, False, True]),
        ({"rope_local": RopeConfig(scaling="linear", factor=4.0)}, [False, True, True, False]),
        ({"window": 6}, [False, True, True, False]),
        ({"attention_softcap": 1.0}, [True, True, True, True]),
        ({"attention_sinks": "all"}, [True, True, True, True]),
        ({"attention_sinks": "local"}, [False, True, True, False]),
    ],
)
def test_an_option_of_one_kind_of_layer_changes_only_those(changes: dict[str, Any], differs: list[bool]) -> None:
    tokens, _ = random_tokens(small_config(), 1, LENGTH)
    models = [make_model(small_config(pattern="GLLG", **more), dtype=torch.float64) for more in ({}, changes)]
    assert _layers_that_change(*models, tokens) == differs
    # The whole model too: it hands each layer the table of its own kind.
    assert not torch.equal(models[0](tokens), models[1](tokens))


def test_layers_without_rope_do_not_know_the_order() -> None:
    """NoPE: with one global layer, permuting the earlier tokens changes nothing at the last position."""
    config = small_config(num_layers=1, pattern="G", rope_global=RopeConfig(enabled=False))
    tokens, _ = random_tokens(config, 1, LENGTH)
    shuffled = torch.cat(
        [tokens[:, torch.randperm(LENGTH - 1, generator=torch.Generator().manual_seed(0))], tokens[:, -1:]], dim=1
    )
    with torch.no_grad():
        model = make_model(config, dtype=torch.float64)
        torch.testing.assert_close(model(shuffled)[:, -1], model(tokens)[:, -1], rtol=0, atol=1e-13 * LENGTH)
        with_rope = make_model(small_config(num_layers=1, pattern="G"), dtype=torch.float64)
        assert (with_rope(shuffled)[:, -1] - with_rope(tokens)[:, -1]).abs().max() > 1e-3


@BACKENDS
def test_a_sink_takes_weight_as_its_value_says(backend: str) -> None:
    tokens, _ = random_tokens(small_config(), 2, LENGTH)
    model = make_model(small_config(attention_sinks="all"), backend=backend, dtype=torch.float64)
    sinks = [layer.self_attn.sinks for layer in model.model.layers]
    with torch.no_grad():
        for parameter in sinks:
            parameter.fill_(-1e4)  # exp(-1e4) is zero: no sink
        without = make_model(small_config(), backend=backend, dtype=torch.float64)
        # float64, some hundred operations deep, on logits of size one to ten.
        torch.testing.assert_close(model(tokens), without(tokens), rtol=0, atol=1e-12)
        for parameter in sinks:
            parameter.fill_(1e4)  # all the weight: no layer sees anything
    assert _changed(model, tokens, PERTURBED) == [[PERTURBED], []]
