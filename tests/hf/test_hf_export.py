"""Exported models load with AutoModelForCausalLM and are the same; what no class can be is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import TOKEN_IDS, load_theirs, logits, save_ours
from models.zebras import random_tokens, small_config

from megazebra.checkpoint.store import CheckpointError
from megazebra.errors import UserError
from megazebra.hf.config_writing import choose_family
from megazebra.hf.exporting import HuggingFaceExport
from megazebra.hf.importing import HuggingFaceImport

LENGTH = 40  # eight windows
# float32 on both sides, sums in another order: tests/models/test_transformers_parity.py derives it.
TOLERANCE = {"rtol": 0.0, "atol": 5e-5}

NOPE = {"enabled": False}
LLAMA3 = {"theta": 5e5, "scaling": "llama3", "factor": 8.0, "original_max_position_embeddings": 32}
YARN = {"scaling": "yarn", "factor": 2.0, "original_max_position_embeddings": 32, "beta_fast": 16.0}
LONGROPE = {
    "scaling": "longrope", "factor": 2.0, "original_max_position_embeddings": 32,
    "short_factor": (1, 1, 1.5, 2), "long_factor": (1, 2, 3, 4),
}  # fmt: skip


def both(rope: dict[str, Any]) -> dict[str, Any]:
    return {"rope_global": rope, "rope_local": rope}


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "all global": ("Llama", {"pattern": "G"}),
    "all options of Llama": (
        "Llama",
        {"pattern": "G", "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "head_dim": 16},
    ),
    "all local": ("Mistral", {"pattern": "L"}),
    "GLLL": ("Cwm", {}),
    "GLLL, wide heads, tied": ("Cwm", {"head_dim": 16, "tie_word_embeddings": True, "mlp_bias": True}),
    "any order": ("Cwm", {"pattern": ("L", "G", 5, "L")}),
    "llama3": ("Cwm", both(LLAMA3)),
    "yarn": ("Cwm", both(YARN)),
    "linear": ("Cwm", both({"scaling": "linear", "factor": 2.0})),
    "ntk": ("Cwm", both({"scaling": "ntk", "factor": 2.0})),
    "longrope": ("Cwm", both(LONGROPE)),
    "abf beside the same theta": (
        "Cwm",
        {"rope_global": {"scaling": "abf", "abf_theta": 5e5}, "rope_local": {"theta": 5e5}},
    ),
    "qk-norm, all global": ("Qwen3", {"pattern": "G", "qk_norm": True}),
    "qk-norm": ("Qwen3", {"qk_norm": True, "head_dim": 16, "attention_bias": True}),
    "no rope in global layers": ("SmolLM3", {"rope_global": NOPE}),
    "no rope in global layers, all options": (
        "SmolLM3",
        {"rope_global": NOPE, "head_dim": 16, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    "no rope at all": ("SmolLM3", both(NOPE)),
    "local layers with biases": ("SmolLM3", {"attention_bias": True}),
    "two thetas": ("GraniteSWA", {"rope_global": {"theta": 5e5}}),
    "two thetas, each stretched alike": (
        "GraniteSWA",
        {"rope_global": YARN | {"theta": 5e5}, "rope_local": YARN, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    "ntk beside none": ("GraniteSWA", {"rope_global": {"scaling": "ntk", "factor": 2.0}, "head_dim": 16}),
    "sinks everywhere": ("GraniteSWA", {"attention_sinks": "all", "attention_bias": True}),
    "sinks in local layers, no rope in global ones": (
        "GraniteSWA",
        {"attention_sinks": "local", "rope_global": NOPE, "num_attention_heads": 6, "head_dim": 8},
    ),
    "heads that do not divide the width": ("SmolLM3", {"num_attention_heads": 6, "head_dim": 8}),
}


def export(folder: Path, **changes: Any) -> tuple[Any, Any]:
    ours = save_ours(folder / "model", **changes)
    HuggingFaceExport(folder / "model", TOKEN_IDS).write(folder / "hf")
    return ours, load_theirs(folder / "hf")


@pytest.mark.parametrize("case", CASES)
def test_the_class_is_chosen_that_gives_our_logits_and_it_can_be_imported(tmp_path: Path, case: str) -> None:
    name, changes = CASES[case]
    ours, theirs = export(tmp_path, **changes)
    assert type(theirs).__name__ == f"{name}ForCausalLM"
    tokens, _ = random_tokens(ours.model.config, 2, LENGTH)
    expected = logits(ours, tokens)
    assert expected.abs().max() > 1, "of size one, so that the tolerance means something"
    torch.testing.assert_close(logits(theirs, tokens), expected, **TOLERANCE)

    back, config = HuggingFaceImport(tmp_path / "hf").config, ours.model.config
    assert [spec.window for spec in back.attention_specs()] == [spec.window for spec in config.attention_specs()]
    assert [spec.rope.enabled for spec in back.attention_specs()] == [
        spec.rope.enabled for spec in config.attention_specs()
    ]
    # The pattern may be told otherwise, and ntk and abf are thetas there; what has a default is told.
    told_otherwise = {"pattern", "window", "num_kv_heads", "head_dim", "rope_global", "rope_local"}
    assert back.model_dump(exclude=told_otherwise) == config.model_dump(exclude=told_otherwise)
    assert (back.kv_heads, back.head_size) == (config.kv_heads, config.head_size)


@pytest.mark.parametrize("case", ["GLLL", "all local", "qk-norm", "no rope in global layers", "two thetas"])
def test_cached_generation_is_the_argmax_of_the_full_forward(tmp_path: Path, case: str) -> None:
    ours, theirs = export(tmp_path, **CASES[case][1])
    theirs.generation_config.eos_token_id = None
    tokens, _ = random_tokens(ours.model.config, 2, 12)
    mask = torch.ones_like(tokens)
    generated = theirs.generate(
        tokens, attention_mask=mask, max_new_tokens=LENGTH - 12, do_sample=False, pad_token_id=0
    )
    assert generated.shape == (2, LENGTH)
    expected = logits(ours, generated)[:, 11:-1].argmax(-1)
    assert torch.equal(generated[:, 12:], expected)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "sinks and qk-norm": (
        {"attention_sinks": "local", "qk_norm": True},
        r"(?s)Qwen3ForCausalLM: model.attention_sinks=local.*GraniteSWAForCausalLM: model.qk_norm=true",
    ),
    "softcap": ({"attention_softcap": 30.0}, r"model.attention_softcap=30.0 \(only null\)"),
    "final softcap": ({"final_logit_softcap": 30.0}, r"model.final_logit_softcap=30.0 \(only null\)"),
    "two windows": ({"pattern": ("G", 5, 7, "L")}, r"model.pattern has the windows \[5, 7\] \(only one\)"),
    "two scalings": (
        {"rope_global": {"scaling": "linear", "factor": 2.0}},
        r"rope_global and model.rope_local differ in more than theta \(.*linear.*default.*\); --remote-code exports it",
    ),
    "two thetas and qk-norm": (
        {"rope_global": {"theta": 5e5}, "qk_norm": True},
        "(?s)Qwen3ForCausalLM: model.rope_global and model.rope_local differ .*--remote-code exports it",
    ),
    "qk-norm and no rope": (
        {"qk_norm": True, "rope_global": NOPE},
        r"(?s)Qwen3ForCausalLM: layers without RoPE.*SmolLM3ForCausalLM: model.qk_norm=true",
    ),
    "qk-norm and biases": ({"qk_norm": True, "mlp_bias": True}, "Qwen3ForCausalLM: model.mlp_bias=true"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_no_class_represents_is_refused(case: str) -> None:
    changes, message = REFUSED[case]
    with pytest.raises(UserError, match=message):
        choose_family(small_config(**changes))


@pytest.mark.parametrize("pattern", ["GLLL", "L", "GL", "LLLG"])
@pytest.mark.parametrize("options", [{}, {"qk_norm": True}, {"rope_global": NOPE}, {"attention_bias": True}])
def test_local_layers_never_go_to_a_class_that_ignores_them(pattern: str, options: dict[str, Any]) -> None:
    chosen = choose_family(small_config(pattern=pattern, **options)).architecture
    allowed = {"CwmForCausalLM", "Qwen3ForCausalLM", "SmolLM3ForCausalLM"}
    assert chosen in (allowed | {"MistralForCausalLM"} if pattern == "L" else allowed)


def test_the_configuration_says_all_that_classes_would_guess(tmp_path: Path) -> None:
    export(tmp_path)
    fields = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert fields["rope_parameters"] == {"rope_type": "default", "rope_theta": 10000.0}
    assert fields["rope_theta"] == 10000.0
    assert fields["rope_scaling"] == {"rope_type": "default"}
    assert fields["head_dim"] == 8
    assert (fields["bos_token_id"], fields["eos_token_id"], fields["pad_token_id"]) == (1, 2, None)
    assert fields["layer_types"] == ["full_attention", *["sliding_attention"] * 3]
    assert fields["sliding_window"] == 5
    assert json.loads((tmp_path / "hf" / "generation_config.json").read_text()) == {
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def test_a_class_that_needs_token_ids_asks_for_them(tmp_path: Path) -> None:
    save_ours(tmp_path / "model")
    with pytest.raises(UserError, match=r"CwmForCausalLM needs eos_token_id.*give --eos-token-id"):
        HuggingFaceExport(tmp_path / "model", {"bos_token_id": 1})
    save_ours(tmp_path / "global", pattern="G")
    HuggingFaceExport(tmp_path / "global").write(tmp_path / "hf")
    assert load_theirs(tmp_path / "hf").config.eos_token_id is None


def test_dtype_and_file_size_can_be_chosen(tmp_path: Path) -> None:
    ours = save_ours(tmp_path / "model")
    HuggingFaceExport(tmp_path / "model", TOKEN_IDS).write(tmp_path / "hf", dtype=torch.bfloat16, max_file_bytes=10_000)
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 2
    theirs = load_theirs(tmp_path / "hf")
    assert theirs.dtype == torch.bfloat16
    weights = dict(theirs.named_parameters())
    assert all(torch.equal(weights[name], parameter.bfloat16()) for name, parameter in ours.named_parameters())


def test_a_damaged_folder_leaves_no_export(tmp_path: Path) -> None:
    save_ours(tmp_path / "model")
    path = tmp_path / "model" / "model-00001-of-00001.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{path.name} is damaged"):
        HuggingFaceExport(tmp_path / "model", TOKEN_IDS).write(tmp_path / "hf")
    assert [child.name for child in tmp_path.iterdir()] == ["model"]
