"""The class that travels with its weights is our model: its logits, cache, gradients and way back."""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import TOKEN_IDS, load_theirs, logits, save_ours
from models.zebras import random_tokens, small_config
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import megazebra.hf
from megazebra.attention.packing import Packing
from megazebra.checkpoint.model_folder import ModelFolder
from megazebra.errors import UserError
from megazebra.hf.config_writing import choose_family
from megazebra.hf.exporting import HuggingFaceExport
from megazebra.hf.importing import HuggingFaceImport
from megazebra.labels import IGNORE_INDEX
from megazebra.models.zebra import ZebraModel

LENGTH = 40  # eight windows
# float32 on both sides, sums in another order: tests/models/test_transformers_parity.py derives it.
TOLERANCE = {"rtol": 0.0, "atol": 5e-5}

NOPE = {"enabled": False}
LINEAR = {"scaling": "linear", "factor": 2.0}
NTK = {"scaling": "ntk", "factor": 2.0}
ABF = {"scaling": "abf", "abf_theta": 5e5}
LLAMA3 = {"theta": 5e5, "scaling": "llama3", "factor": 8.0, "original_max_position_embeddings": 32}
YARN = {"scaling": "yarn", "factor": 2.0, "original_max_position_embeddings": 32, "beta_fast": 16.0}
LONGROPE = {
    "scaling": "longrope", "factor": 2.0, "original_max_position_embeddings": 32,
    "short_factor": (1, 1, 1.5, 2), "long_factor": (1, 2, 3, 4),
}  # fmt: skip
EVERYTHING = {
    "pattern": ("G", 5, 7, "L"), "window": 3, "num_kv_heads": 1, "head_dim": 16, "qk_norm": True,
    "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "attention_sinks": "local",
    "attention_softcap": 3.0, "final_logit_softcap": 2.0, "rope_global": YARN, "rms_norm_eps": 1e-3,
}  # fmt: skip

CASES: dict[str, dict[str, Any]] = {
    "linear beside none": {"rope_global": LINEAR},
    "ntk beside linear": {"rope_global": NTK, "rope_local": LINEAR},
    "abf beside linear": {"rope_global": ABF, "rope_local": LINEAR},
    "yarn beside none": {"rope_global": YARN},
    "yarn with a factor of attention": {"rope_global": YARN | {"attention_factor": 1.5}},
    "llama3 beside yarn": {"rope_global": LLAMA3, "rope_local": YARN},
    "longrope beside none": {"rope_global": LONGROPE},
    "none beside longrope": {"rope_global": NOPE, "rope_local": LONGROPE, "attention_softcap": 30.0},
    "no rope, qk-norm": {"rope_global": NOPE, "rope_local": NOPE, "qk_norm": True},
    "no rope in local layers, qk-norm": {"rope_local": NOPE, "qk_norm": True},
    "several windows": {"pattern": ("L", "G", 7, 1)},
    "softcap": {"attention_softcap": 3.0},
    "final softcap": {"final_logit_softcap": 2.0, "pattern": "G"},
    "sinks and qk-norm": {"attention_sinks": "all", "qk_norm": True, "pattern": "LLLG"},
    "sinks of local layers and softcap": {"attention_sinks": "local", "attention_softcap": 3.0},
    "everything": EVERYTHING,
}


def export(folder: Path, **changes: Any) -> tuple[ZebraModel, PreTrainedModel]:
    ours = save_ours(folder / "model", **changes)
    HuggingFaceExport(folder / "model", TOKEN_IDS, remote_code=True).write(folder / "hf")
    theirs = load_theirs(folder / "hf", trust_remote_code=True)
    assert type(theirs).__name__ == "ZebraForCausalLM"
    return ours, theirs


def tokens_for(ours: ZebraModel, batch: int = 2) -> Tensor:
    return random_tokens(ours.model.config, batch, LENGTH)[0]


@pytest.mark.parametrize("case", CASES)
def test_it_gives_our_logits_and_comes_back_bit_for_bit(tmp_path: Path, case: str) -> None:
    ours, theirs = export(tmp_path, **CASES[case])
    tokens = tokens_for(ours)
    for length in (LENGTH, 20):  # longrope has one set of frequencies beyond 32 tokens and one up to there
        expected = logits(ours, tokens[:, :length])
        assert expected.abs().max() > 1, "of size one, so that the tolerance means something"
        torch.testing.assert_close(logits(theirs, tokens[:, :length]), expected, **TOLERANCE)

    back = HuggingFaceImport(tmp_path / "hf")
    config = ours.model.config
    assert [spec.window for spec in back.config.attention_specs()] == [s.window for s in config.attention_specs()]
    # The pattern may be told otherwise, and ntk and abf are thetas there; what has a default is told.
    told_otherwise = {"pattern", "window", "num_kv_heads", "head_dim", "rope_global", "rope_local"}
    assert back.config.model_dump(exclude=told_otherwise) == config.model_dump(exclude=told_otherwise)
    back.write(tmp_path / "back")
    before, after = ModelFolder.open(tmp_path / "model"), ModelFolder.open(tmp_path / "back")
    assert set(before.names) == set(after.names)
    assert all(before.tensor(name).equal(after.tensor(name)) for name in before.names)
    HuggingFaceExport(tmp_path / "back", TOKEN_IDS, remote_code=True).write(tmp_path / "again")
    assert (tmp_path / "again" / "config.json").read_text() == (tmp_path / "hf" / "config.json").read_text()


@torch.no_grad()
@pytest.mark.parametrize("case", ["yarn beside none", "several windows", "sinks and qk-norm", "everything"])
def test_pieces_through_the_cache_give_the_logits_of_the_whole(tmp_path: Path, case: str) -> None:
    ours, theirs = export(tmp_path, **CASES[case])
    tokens = tokens_for(ours)
    cache, pieces = None, []
    for piece in tokens.split([12, 5, *[1] * (LENGTH - 17)], dim=1):
        outputs = theirs(piece, past_key_values=cache, use_cache=True)
        cache = outputs[1]  # transformers calls it past_key_values or cache
        pieces.append(outputs.logits)
    torch.testing.assert_close(torch.cat(pieces, dim=1), logits(ours, tokens), **TOLERANCE)
    windows = theirs.config.layer_windows
    widest = max((window for window in windows if window is not None), default=0)
    kept = [layer.keys.shape[2] for layer in cache.layers]
    assert kept == [LENGTH if window is None else widest - 1 for window in windows]


def generate(model: PreTrainedModel, tokens: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
    model.generation_config.eos_token_id = None
    mask = torch.ones_like(tokens) if mask is None else mask
    options = {"max_length": LENGTH, "do_sample": False, "pad_token_id": 0} | options
    return model.generate(tokens, attention_mask=mask, **options)


@pytest.mark.parametrize("case", ["llama3 beside yarn", "several windows", "everything"])
def test_generation_is_the_argmax_of_the_full_forward(tmp_path: Path, case: str) -> None:
    ours, theirs = export(tmp_path, **CASES[case])
    generated = generate(theirs, tokens_for(ours)[:, :12])
    assert generated.shape == (2, LENGTH)
    assert torch.equal(generated[:, 12:], logits(ours, generated)[:, 11:-1].argmax(-1))
    beams = generate(theirs, generated[:, :12], num_beams=3)
    assert torch.equal(beams, generate(theirs, generated[:, :12], num_beams=3, use_cache=False))


@torch.no_grad()
@pytest.mark.parametrize("case", ["longrope beside none", "several windows", "everything"])
def test_padding_on_the_left_changes_nothing(tmp_path: Path, case: str) -> None:
    ours, theirs = export(tmp_path, **CASES[case])
    tokens = tokens_for(ours)[:, :36]
    mask = torch.ones_like(tokens)
    mask[0, :16] = 0  # the first row has 20 tokens, the second 36
    padded = theirs(tokens, attention_mask=mask).logits
    assert padded.isfinite().all()
    torch.testing.assert_close(padded[:1, 16:], logits(ours, tokens[:1, 16:]), **TOLERANCE)
    torch.testing.assert_close(padded[1:], logits(ours, tokens[1:]), **TOLERANCE)
    generated = generate(theirs, tokens, mask)
    assert torch.equal(generated[:1, 36:], generate(theirs, tokens[:1, 16:], max_length=LENGTH - 16)[:, 20:])
    assert torch.equal(generated[1:, 36:], generate(theirs, tokens[1:])[:, 36:])


def test_positions_that_begin_again_are_documents(tmp_path: Path) -> None:
    ours, theirs = export(tmp_path, **EVERYTHING)
    tokens = tokens_for(ours, batch=1)
    lengths = [11, 3, 26]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    packing = Packing.from_document_lengths([lengths])
    with torch.no_grad():
        packed = theirs(tokens, position_ids=positions, use_cache=False).logits
        torch.testing.assert_close(packed, ours(tokens, positions_BS=positions, packing=packing), **TOLERANCE)


@pytest.mark.parametrize("recompute", [False, True])
def test_loss_and_gradients_are_ours(tmp_path: Path, recompute: bool) -> None:
    ours, theirs = export(tmp_path, **EVERYTHING)
    tokens = tokens_for(ours)
    labels = torch.cat([tokens[:, 1:], torch.full((2, 1), IGNORE_INDEX)], dim=1)
    theirs.train()
    if recompute:  # transformers renamed it
        getattr(theirs, "activation_checkpointing_enable", theirs.gradient_checkpointing_enable)()
        assert all(layer.gradient_checkpointing for layer in theirs.model.layers)
    expected = ours(tokens, labels) / (2 * (LENGTH - 1))
    expected.backward()
    loss = theirs(tokens, labels=tokens).loss
    loss.backward()
    # A mean of token losses, each off by twice what a logit is.
    torch.testing.assert_close(loss, expected, rtol=0, atol=2 * TOLERANCE["atol"])
    gradients = {name: parameter.grad for name, parameter in ours.named_parameters()}
    assert gradients.keys() == dict(theirs.named_parameters()).keys()
    for name, parameter in theirs.named_parameters():
        # The same error as a logit's relative to the weight's largest gradient, doubled for the way back.
        largest = gradients[name].abs().max().item()
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=0, atol=2 * TOLERANCE["atol"] * largest)
    generated = generate(theirs, tokens[:, :12])  # while training, as reinforcement learning does
    assert torch.equal(generated, generate(theirs.eval(), tokens[:, :12]))


def test_what_transformers_saves_loads_again_and_can_be_imported(tmp_path: Path) -> None:
    ours, theirs = export(tmp_path, **EVERYTHING)
    theirs.save_pretrained(tmp_path / "saved")
    names = {path.name for path in (tmp_path / "saved").iterdir()}
    assert {"configuration_zebra.py", "modeling_zebra.py"} <= names
    tokens = tokens_for(ours)
    again = load_theirs(tmp_path / "saved", trust_remote_code=True)
    assert torch.equal(logits(again, tokens), logits(theirs, tokens))
    config = HuggingFaceImport(tmp_path / "saved").config
    assert config.attention_specs() == HuggingFaceImport(tmp_path / "hf").config.attention_specs()
    assert (config.final_logit_softcap, config.qk_norm) == (2.0, True)


def test_bfloat16_loads_and_generates(tmp_path: Path) -> None:
    ours, _ = export(tmp_path, **EVERYTHING)
    theirs = load_theirs(tmp_path / "hf", trust_remote_code=True, dtype=torch.bfloat16)
    tokens = tokens_for(ours)
    assert generate(theirs, tokens[:, :12]).shape == (2, LENGTH)
    # 8 bits through ten layers of sums of size one; the final soft-cap keeps logits below two.
    torch.testing.assert_close(logits(theirs, tokens).float(), logits(ours, tokens), rtol=0, atol=0.15)


def test_what_it_cannot_do_is_refused(tmp_path: Path) -> None:
    ours, theirs = export(tmp_path, **CASES["longrope beside none"])
    tokens = tokens_for(ours)
    with pytest.raises(ValueError, match=r"longrope has other frequencies beyond 32 tokens.*use_cache=False"):
        generate(theirs, tokens[:, :30])
    generated = generate(theirs, tokens[:, :30], use_cache=False)
    assert torch.equal(generated[:, 39], logits(ours, generated[:, :39])[:, -1].argmax(-1))
    assert torch.equal(generate(theirs, tokens[:, :33])[:, :33], tokens[:, :33])
    with pytest.raises(ValueError, match="static caches are not supported"):
        generate(theirs, tokens[:, :12], cache_implementation="static")
    with pytest.raises(ValueError, match=r"attention_mask has shape \[2, 11\]; give one of \[2, 12\]"):
        theirs(tokens[:, :12], attention_mask=torch.ones(2, 11))
    with pytest.raises(ValueError, match="give either input_ids or inputs_embeds"):
        theirs()
    theirs.train()
    theirs.model.gradient_checkpointing = True
    with pytest.raises(ValueError, match="recomputed layers would add their keys twice; pass no cache"):
        theirs(tokens, past_key_values=DynamicCache())


def test_it_is_the_last_resort_and_asked_for() -> None:
    assert choose_family(small_config(), remote_code=True).architecture == "CwmForCausalLM"
    assert choose_family(small_config(qk_norm=True, mlp_bias=True), remote_code=True).architecture == "ZebraForCausalLM"
    with pytest.raises(UserError, match="--remote-code exports it with a class of its own"):
        choose_family(small_config(attention_softcap=3.0))


def test_its_code_needs_torch_and_transformers_only(tmp_path: Path) -> None:
    folder = Path(megazebra.hf.__path__[0]) / "remote_code"
    export(tmp_path, attention_softcap=3.0)
    fields = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert fields["auto_map"]["AutoModelForCausalLM"] == "modeling_zebra.ZebraForCausalLM"
    for path in folder.glob("*.py"):
        assert (tmp_path / "hf" / path.name).read_bytes() == path.read_bytes()
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module] if node.level == 0 else []
                assert node.level == 0 or node.module == "configuration_zebra"
            for name in names:
                root = name.split(".")[0]
                assert root in {"torch", "transformers"} or root in sys.stdlib_module_names, name
