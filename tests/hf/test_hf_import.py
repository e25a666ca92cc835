"""Models of transformers come in as they are, into their own pattern or another; what we cannot be is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import SIZES, TOKEN_IDS, edit_config, load_ours, load_theirs, logits, save_ours, save_theirs
from models.zebras import random_tokens
from safetensors.torch import load_file, save_file
from transformers import (
    CwmConfig,
    GraniteSWAConfig,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen3Config,
    SmolLM3Config,
)

from megazebra.checkpoint.model_folder import ModelFolder
from megazebra.checkpoint.store import CheckpointError
from megazebra.config import RopeConfig
from megazebra.errors import UserError
from megazebra.hf.config_reading import model_config
from megazebra.hf.exporting import HuggingFaceExport
from megazebra.hf.importing import HuggingFaceImport

LENGTH, WINDOW = 40, 7
# float32 on both sides, sums in another order: tests/models/test_transformers_parity.py derives it.
TOLERANCE = {"rtol": 0.0, "atol": 5e-5}
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
GLLL = ["full_attention", *["sliding_attention"] * 3]
HALF_LOCAL = ["full_attention"] * 2 + ["sliding_attention"] * 2

CASES: dict[str, tuple[PretrainedConfig, str]] = {
    "llama": (LlamaConfig(**SIZES, rope_parameters=PLAIN), "G"),
    "llama3": (LlamaConfig(**SIZES, rope_parameters=LLAMA3, tie_word_embeddings=True), "G"),
    "llama with biases": (LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True), "G"),
    "mistral": (MistralConfig(**SIZES, sliding_window=WINDOW), "L"),
    "mistral without a window": (MistralConfig(**SIZES, sliding_window=None), "G"),
    "qwen3": (Qwen3Config(**SIZES | {"head_dim": 16}), "G"),
    "qwen3 with windows": (
        Qwen3Config(**SIZES, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=2),
        "GGLL",
    ),
    "cwm": (CwmConfig(**SIZES, rope_parameters=PLAIN, sliding_window=WINDOW), "GLLL"),
    "cwm in another order": (
        CwmConfig(**SIZES, rope_parameters=LLAMA3, sliding_window=WINDOW, layer_types=GLLL[::-1]),
        "LLLG",
    ),
    "smollm3": (SmolLM3Config(**SIZES, use_sliding_window=True, sliding_window=WINDOW, layer_types=GLLL,
                              no_rope_layers=[0, 1, 1, 1]), "GLLL"),
    "granite_swa": (GraniteSWAConfig(**SIZES, sliding_window=WINDOW, attention_multiplier=8**-0.5, attention_bias=True,
                                     layer_rope_theta=[5e5, 0, 0, 0], tie_word_embeddings=False), "GLLL"),
}  # fmt: skip


def fields(**changes: Any) -> dict[str, Any]:
    """A Llama's config.json; `...` removes a field."""
    everything = {"model_type": "llama", **SIZES, "rope_parameters": PLAIN} | changes
    return {name: value for name, value in everything.items() if value is not ...}


@pytest.mark.parametrize("case", CASES)
def test_the_same_logits_and_bit_for_bit_back(tmp_path: Path, case: str) -> None:
    config, pattern = CASES[case]
    theirs = save_theirs(config, tmp_path / "hf")
    HuggingFaceImport(tmp_path / "hf").write(tmp_path / "model")
    ours = load_ours(tmp_path / "model")
    assert ours.model.config.pattern == pattern
    tokens, _ = random_tokens(ours.model.config, 2, LENGTH)
    expected = logits(theirs, tokens)
    assert expected.abs().max() > 1, "of size one, so that the tolerance means something"
    torch.testing.assert_close(logits(ours, tokens), expected, **TOLERANCE)

    HuggingFaceExport(tmp_path / "model").write(tmp_path / "back")
    before = load_file(tmp_path / "hf" / "model.safetensors")
    after = load_file(tmp_path / "back" / "model-00001-of-00001.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype
        assert torch.equal(tensor.view(torch.uint8), after[name].view(torch.uint8))
    assert torch.equal(logits(load_theirs(tmp_path / "back", attn_implementation="eager"), tokens), expected)


def test_bfloat16_keeps_its_bits_and_sharded_files_are_joined(tmp_path: Path) -> None:
    theirs = save_theirs(CASES["llama"][0], tmp_path / "hf").bfloat16()
    theirs.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    HuggingFaceImport(tmp_path / "sharded").write(tmp_path / "model")
    ours = ModelFolder.open(tmp_path / "model")
    weights = theirs.state_dict()
    assert set(ours.names) == set(weights)
    assert all(torch.equal(ours.tensor(name), weights[name]) for name in ours.names)


@pytest.mark.parametrize(("pattern", "window"), [("GLLL", 5), ("GL", 9), ("LLLG", 3)])
def test_into_another_pattern(tmp_path: Path, pattern: str, window: int) -> None:
    theirs = save_theirs(CASES["llama"][0], tmp_path / "hf")
    HuggingFaceImport(tmp_path / "hf", pattern, window).write(tmp_path / "model")
    ours = load_ours(tmp_path / "model")
    assert (ours.model.config.pattern, ours.model.config.window) == (pattern, window)
    tokens, _ = random_tokens(ours.model.config, 2, LENGTH)
    # Beyond the window the outputs differ, before its end they cannot.
    mine, full = logits(ours, tokens), logits(theirs, tokens)
    torch.testing.assert_close(mine[:, :window], full[:, :window], **TOLERANCE)
    assert (mine[:, window:] - full[:, window:]).abs().max() > 0.1


def test_a_pattern_puts_layers_without_rope_where_they_belong() -> None:
    smollm3 = fields(model_type="smollm3", no_rope_layers=[1, 1, 1, 0])
    config = model_config(smollm3, "LLLG", 16)
    assert (config.rope_local.enabled, config.rope_global.enabled) == (True, False)
    with pytest.raises(UserError, match=r"no_rope_layers=\[1, 1, 1, 0\] gives the local layers of GLLL different"):
        model_config(smollm3, "GLLL", 16)
    with pytest.raises(
        UserError, match="gives the global layers of GGGG different rotary embeddings; choose a pattern"
    ):
        model_config(smollm3)


def test_the_longest_repetition_is_found() -> None:
    cwm = {"model_type": "cwm", "num_hidden_layers": 6, "layer_types": ["sliding_attention", "full_attention"] * 3}
    assert model_config(fields(**cwm)).pattern == "LG"
    cwm["layer_types"] = [GLLL[0], *GLLL[1:], *GLLL[:2]]
    assert model_config(fields(**cwm)).pattern == "GLLL"


SPELLINGS: dict[str, tuple[dict[str, Any], RopeConfig]] = {
    "new": ({"rope_parameters": PLAIN | {"rope_theta": 5e5}}, RopeConfig(theta=5e5)),
    "theta alone": ({"rope_parameters": ..., "rope_theta": 5e5}, RopeConfig(theta=5e5)),
    "null scaling": ({"rope_parameters": ..., "rope_theta": 5e5, "rope_scaling": None}, RopeConfig(theta=5e5)),
    "nothing": ({"rope_parameters": ...}, RopeConfig()),
    "type": (
        {"rope_parameters": ..., "rope_scaling": {"type": "linear", "factor": 2.0}},
        RopeConfig(scaling="linear", factor=2.0),
    ),
    "rope_type": (
        {"rope_parameters": ..., "rope_theta": 5e5, "rope_scaling": {**LLAMA3, "rope_theta": None}},
        RopeConfig(theta=5e5, scaling="llama3", factor=8.0, original_max_position_embeddings=32),
    ),
    "both": (
        {"rope_parameters": LLAMA3, "rope_theta": 5e5, "rope_scaling": LLAMA3},
        RopeConfig(theta=5e5, scaling="llama3", factor=8.0, original_max_position_embeddings=32),
    ),
    "length outside": (
        {
            "rope_parameters": {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4},
            "original_max_position_embeddings": 16,
        },
        RopeConfig(
            scaling="longrope", factor=4.0, original_max_position_embeddings=16,
            short_factor=(1.0,) * 4, long_factor=(2.0,) * 4,
        ),
    ),
    "whole rotary": ({"partial_rotary_factor": 1.0}, RopeConfig()),
}  # fmt: skip


@pytest.mark.parametrize("case", SPELLINGS)
def test_every_spelling_of_rope(case: str) -> None:
    changes, expected = SPELLINGS[case]
    config = model_config(fields(**changes))
    assert config.rope_global == config.rope_local == expected


def test_cwm_takes_its_own_rope_where_config_json_has_none() -> None:
    cwm = fields(model_type="cwm", rope_parameters=..., max_position_embeddings=131072)
    rope = model_config(cwm).rope_global
    own = CwmConfig(**SIZES | {"max_position_embeddings": 131072}).rope_parameters
    assert (rope.scaling, rope.theta, rope.factor) == (own["rope_type"], own["rope_theta"], own["factor"])
    assert rope.original_max_position_embeddings == own["original_max_position_embeddings"]
    with pytest.raises(UserError, match=r"'rope_theta': 10000.0.* alone is ignored by this model's class"):
        model_config(cwm | {"rope_theta": 10000.0})


KINDS = [LlamaConfig, MistralConfig, CwmConfig, Qwen3Config, SmolLM3Config, GraniteSWAConfig]


@pytest.mark.parametrize("kind", KINDS)
def test_absent_fields_are_those_of_the_class(kind: type[PretrainedConfig]) -> None:
    own = kind(num_hidden_layers=4)
    sizes = {name: getattr(own, name) for name in SIZES if name not in ("num_key_value_heads", "head_dim")}
    factors = {"attention_multiplier": (own.hidden_size // own.num_attention_heads) ** -0.5}  # its own is not ours
    config = model_config({"model_type": own.model_type, **sizes, **factors}, "LLLG", 16)
    assert config.kv_heads == own.num_key_value_heads
    assert config.head_size == getattr(own, "head_dim", own.hidden_size // own.num_attention_heads)
    assert config.rms_norm_eps == own.rms_norm_eps
    assert config.tie_word_embeddings == own.tie_word_embeddings
    assert config.rope_global.theta == own.rope_parameters["rope_theta"]
    assert config.init_std == own.initializer_range


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another model": ({"model_type": "gemma3"}, "model_type='gemma3' is not supported; we read llama, mistral"),
    "no size": ({"hidden_size": ...}, "hidden_size=None in config.json must be a whole number"),
    "no number": ({"vocab_size": "many"}, "vocab_size='many' in config.json must be a whole number"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
    "dropout": ({"attention_dropout": 0.1}, "attention_dropout=0.1 is not supported; set it to 0"),
    "quantized": ({"quantization_config": {"bits": 4}}, "quantization_config: .* take the unquantized model"),
    "ignored layers": ({"layer_types": GLLL}, "layer_types is ignored by LlamaForCausalLM.*correct model_type"),
    "dynamic rope": (
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
        r"rope_type='dynamic' is not supported \(we have default, linear",
    ),
    "partial rotary": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 of rope_type='default'"),
    "unknown rope option": (
        {"rope_parameters": {**PLAIN, "rope_type": "yarn", "factor": 2.0, "truncate": False}},
        "truncate=False of rope_type='yarn' is not supported",
    ),
    "ropes by layer": (
        {"rope_parameters": {"full_attention": PLAIN, "sliding_attention": PLAIN}},
        "rope_parameters.full_attention: .* not read by this class",
    ),
    "two thetas": ({"rope_theta": 5e5}, "rope_theta is 10000.0 in rope_parameters and 500000.0 in config.json"),
    "wrong rope value": ({"rope_parameters": {**LLAMA3, "factor": "x"}}, "rope_parameters: factor='x'"),
    "heads": ({"num_key_value_heads": 3}, "model.num_kv_heads must divide"),
    "epsilon": ({"rms_norm_eps": -1}, "rms_norm_eps=-1: Input should be greater than 0"),
    "too few layers": (
        {"model_type": "cwm", "layer_types": GLLL[:3]},
        "layer_types=.* must name 4 layers",
    ),
    "no window": (
        {"model_type": "qwen3", "layer_types": GLLL, "use_sliding_window": False},
        "layer_types has sliding_attention but there is no window; set sliding_window",
    ),
    "another scale of logits": (
        {"model_type": "granite_swa", "attention_multiplier": 0.5},
        "attention_multiplier=0.5 is not supported; our models have 0.353553 there",
    ),
    "another scale of residuals": (
        {"model_type": "granite_swa", "attention_multiplier": 8**-0.5, "residual_multiplier": 0.2},
        "residual_multiplier=0.2 is not supported; our models have 1 there",
    ),
    "few thetas": (
        {"model_type": "granite_swa", "attention_multiplier": 8**-0.5, "layer_rope_theta": [1e4]},
        r"layer_rope_theta=\[10000.0\] must have a number >= 0 for each of num_hidden_layers=4",
    ),
    "thetas of one kind": (
        {"model_type": "granite_swa", "attention_multiplier": 8**-0.5, "layer_rope_theta": [1e4, 1e4, 1e4, 5e5]},
        "gives the local layers of GLLL different rotary embeddings; choose a pattern",
    ),
    "few windows": ({"model_type": "zebra", "layer_windows": [3]}, "layer_windows=.3. must have an entry for each"),
    "rope of another form": (
        {"model_type": "zebra", "global_rope": 1e4},
        "global_rope=10000.0 must be null or an object",
    ),
    "a type of no form": ({"model_type": ["llama"]}, "model_type=.'llama'. is not supported"),
    "layers without number": (
        {"num_hidden_layers": 2**60},
        "num_hidden_layers=1152921504606846976 in config.json is more",
    ),
    "kinds of no form": ({"model_type": "cwm", "layer_types": [{}] * 4}, "layer_types=.* must name 4 layers"),
    "windows of no form": ({"model_type": "zebra", "layer_windows": [{}] * 4}, "layer_windows=.*a number or null"),
    "rope of no form": ({"rope_scaling": [1]}, r"rope_scaling=\[1\] must be an object"),
    "rope type of no form": ({"rope_parameters": {"rope_type": []}}, r"rope_type=\[\] is not supported"),
    "lengths of no form": (
        {"rope_parameters": {"rope_type": "yarn", "original_max_position_embeddings": "4"}},
        "original_max_position_embeddings='4' must be a number of tokens",
    ),
    "interval of no form": ({"model_type": "smollm3", "no_rope_layer_interval": 0}, "no_rope_layer_interval=0 must be"),
    "layers of no form": (
        {"model_type": "qwen3", "use_sliding_window": True, "max_window_layers": "x"},
        "max_window_layers='x' must be a whole number",
    ),
    "few rope flags": ({"model_type": "smollm3", "no_rope_layers": [1]}, "no_rope_layers=.1. must have an entry"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_unsupported_options_name_field_value_and_mend(case: str) -> None:
    changes, message = REFUSED[case]
    with pytest.raises(UserError, match=message):
        model_config(fields(**changes))


def test_sinks_belong_to_no_layer_to_all_or_to_the_local_ones() -> None:
    granite = fields(model_type="granite_swa", attention_multiplier=8**-0.5, sliding_window=WINDOW)
    for layers, expected in (((), "none"), (range(4), "all"), ((1, 2, 3), "local")):
        assert model_config(granite, sinks=layers).attention_sinks == expected
    assert model_config(granite, "LLLG", sinks=(0, 1, 2)).attention_sinks == "local"
    with pytest.raises(UserError, match=r"layers \[0\] have attention sinks, which are neither .* of the pattern GLLL"):
        model_config(granite, sinks=[0])


def test_sinks_that_never_took_weight_are_left_out_though_decayed(tmp_path: Path) -> None:
    save_ours(tmp_path / "model", attention_sinks="local")
    HuggingFaceExport(tmp_path / "model", TOKEN_IDS).write(tmp_path / "hf")
    (path,) = (tmp_path / "hf").glob("*.safetensors")
    weights = load_file(path)
    absent = weights["model.layers.0.self_attn.sinks"]
    assert torch.equal(absent, torch.full((4,), -16384.0))
    absent *= 0.75
    save_file(weights, path, {"format": "pt"})
    config = HuggingFaceImport(tmp_path / "hf").config
    assert config.attention_sinks == "local"


def test_pattern_and_window_belong_together() -> None:
    with pytest.raises(UserError, match="pattern 'GLLL' has local layers and the model has no window; give --window"):
        model_config(fields(), "GLLL")
    with pytest.raises(UserError, match="window 8 is not read: pattern 'G' has no local layer; give --pattern"):
        model_config(fields(), window=8)
    with pytest.raises(UserError, match=r"model.pattern has 'X' at position 1"):
        model_config(fields(), "GX", 8)
    with pytest.raises(UserError, match="window=0: Input should be greater than or equal to 1"):
        model_config(fields(), "GLLL", 0)
    with pytest.raises(UserError, match=r"model.pattern is empty"):
        model_config(fields(), "")
    mistral = fields(model_type="mistral", sliding_window=9)
    assert model_config(mistral, "GLLL").window == 9
    assert model_config(mistral, window=5).window == 5


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    save_theirs(CASES["llama"][0], tmp_path / "hf")
    return tmp_path / "hf"


def change_weights(folder: Path, **changes: Any) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path) | {name.replace("__", "."): value for name, value in changes.items()}
    save_file({name: value for name, value in weights.items() if value is not ...}, path, {"format": "pt"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__norm__weight": ...}, "missing model.norm.weight"),
        ({"model__layers__0__self_attn__q_proj__bias": torch.ones(32)}, "unexpected model.layers.0.self_attn.q_proj"),
        ({"lm_head__weight": ...}, "missing lm_head.weight; set tie_word_embeddings to true"),
        ({"model__norm__weight": torch.ones(31)}, r"model.norm.weight has shape \[31\], .* asks for \[32\]"),
        ({"model__norm__weight": torch.ones(32, dtype=torch.int32)}, "model.norm.weight is torch.int32; quantized"),
    ],
)
def test_weights_that_do_not_fit_are_named(hf: Path, changes: dict[str, Any], message: str) -> None:
    change_weights(hf, **changes)
    with pytest.raises(CheckpointError, match=message):
        HuggingFaceImport(hf)


def test_rotary_frequencies_of_old_files_are_left_out(hf: Path) -> None:
    change_weights(hf, model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(4))
    assert HuggingFaceImport(hf).tensors == 39


def test_a_tied_output_layer_may_be_given_if_it_is_the_embedding(hf: Path) -> None:
    edit_config(hf, tie_word_embeddings=True)
    with pytest.raises(CheckpointError, match=r"lm_head.weight differs from model.embed_tokens.weight"):
        HuggingFaceImport(hf)
    change_weights(hf, lm_head__weight=load_file(hf / "model.safetensors")["model.embed_tokens.weight"])
    given = HuggingFaceImport(hf)
    change_weights(hf, lm_head__weight=...)
    absent = HuggingFaceImport(hf)
    assert given.tensors == absent.tensors == 38
    assert given.config.tie_word_embeddings


def test_damage_names_the_file(hf: Path, tmp_path: Path) -> None:
    path = hf / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(CheckpointError, match=r"model.safetensors is no safetensors file we can read"):
        HuggingFaceImport(hf)
    path.write_bytes(whole[:4])
    with pytest.raises(CheckpointError, match=r"model.safetensors is no safetensors file"):
        HuggingFaceImport(hf)
    path.write_bytes(whole)
    imported = HuggingFaceImport(hf)
    path.write_bytes(whole[:-1])  # after it was looked at
    with pytest.raises(OSError, match=r"ends after .* bytes of a tensor.*model.safetensors"):
        imported.write(tmp_path / "model")
    assert [child.name for child in tmp_path.iterdir()] == ["hf"]
    path.unlink()
    with pytest.raises(CheckpointError, match=r"has neither model.safetensors nor model.safetensors.index.json"):
        HuggingFaceImport(hf)
    (hf / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin is a pickle: save the model again as safetensors"):
        HuggingFaceImport(hf)
    (hf / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config.json cannot be read"):
        HuggingFaceImport(hf)
    (hf / "config.json").unlink()
    with pytest.raises(UserError, match=r"config.json: no such file"):
        HuggingFaceImport(hf)


def test_a_shard_that_is_missing_or_another_is_named(tmp_path: Path) -> None:
    theirs = save_theirs(CASES["llama"][0], tmp_path / "hf", max_shard_size="20KB")
    first, second = sorted((tmp_path / "hf").glob("*.safetensors"))[:2]
    content = first.read_bytes()
    first.unlink()
    with pytest.raises(CheckpointError, match=f"{first.name} is missing"):
        HuggingFaceImport(tmp_path / "hf")
    first.write_bytes(second.read_bytes())
    with pytest.raises(CheckpointError, match=f"{first.name} does not fit model.safetensors.index.json"):
        HuggingFaceImport(tmp_path / "hf")
    first.write_bytes(content)
    assert HuggingFaceImport(tmp_path / "hf").tensors == len(theirs.state_dict())
    (tmp_path / "hf" / "model.safetensors.index.json").write_text('{"weight_map": 3}')
    with pytest.raises(CheckpointError, match=r"model.safetensors.index.json is damaged"):
        HuggingFaceImport(tmp_path / "hf")


def test_tokenizer_and_generation_config_travel_both_ways(hf: Path, tmp_path: Path) -> None:
    files = {"tokenizer.json": b'{"a": 1}', "tokenizer_config.json": b"{}", "chat_template.jinja": b"{{ messages }}"}
    for name, content in files.items():
        (hf / name).write_bytes(content)
    (hf / "generation_config.json").write_text('{"eos_token_id": [2, 3], "temperature": 0.6}')
    imported = HuggingFaceImport(hf)
    assert imported.files == [
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "generation_config.json",
    ]
    imported.write(tmp_path / "model")
    HuggingFaceExport(tmp_path / "model", {"bos_token_id": 5}).write(tmp_path / "back")
    for folder in ("model", "back"):
        for name, content in files.items():
            assert (tmp_path / folder / name).read_bytes() == content
    generation = json.loads((tmp_path / "back" / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 5, "eos_token_id": [2, 3], "temperature": 0.6}
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (5, [2, 3], None)
    (hf / "generation_config.json").unlink()  # as older models have it: config.json knows the ids
    HuggingFaceImport(hf).write(tmp_path / "older")
    assert json.loads((tmp_path / "older" / "generation_config.json").read_text()) == {
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
