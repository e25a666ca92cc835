"""Folders laid out as Megatron's, imported: logits of the Llama they were made from, and refusals of what isn't one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign.megatron_writer import CORE, CORE_LOCAL, LEGACY, options, rank_weights, write_megatron, write_zero_1
from hf.hf_models import SIZES, load_ours, logits, save_theirs
from models.zebras import random_tokens, small_config
from transformers import LlamaConfig, PreTrainedModel

from megazebra.checkpoint.merge import Merge
from megazebra.checkpoint.store import CheckpointError
from megazebra.errors import UserError
from megazebra.foreign.opening import model_of, read_foreign, whole_weights
from megazebra.foreign.shards import ForeignWeights, ShardedModel

# Sums of 40 products of size one, in another order, over four layers.
TOLERANCE = {"rtol": 0.0, "atol": 5e-5}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    return save_theirs(LlamaConfig(**SIZES), tmp_path_factory.mktemp("llama"))


def opened(path: Path) -> ShardedModel:
    sharded = read_foreign(path)
    assert sharded is not None
    return sharded


def weights_of(path: Path, *overrides: str) -> ForeignWeights:
    sharded = opened(path)
    return whole_weights(sharded, model_of(sharded, None, overrides))


@pytest.mark.parametrize("names", [CORE, CORE_LOCAL, LEGACY], ids=["core", "core-local", "legacy"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_logits_are_those_of_the_llama(
    llama: PreTrainedModel, names: dict[str, str], ranks: int, tmp_path: Path
) -> None:
    state = llama.state_dict()
    write_megatron(tmp_path / "megatron", rank_weights(state, llama.config, names, ranks), options(llama.config))
    weights = weights_of(tmp_path / "megatron")
    assert weights.progress == {"step": 12, "samples": 24}
    assert set(weights.names) == state.keys()
    for name in weights.names:
        assert weights.tensor(name).equal(state[name]), name
    Merge(weights, tmp_path / "model", torch.float32, with_optimizer=False).write(10**9)
    tokens, _ = random_tokens(small_config(), 2, 20)
    torch.testing.assert_close(logits(load_ours(tmp_path / "model"), tokens), logits(llama, tokens), **TOLERANCE)


def test_megatron_deepspeed_under_zero_has_both_layouts(llama: PreTrainedModel, tmp_path: Path) -> None:
    state = llama.state_dict()
    write_zero_1(tmp_path, rank_weights(state, llama.config, LEGACY, 2), options(llama.config), data=3)
    weights = weights_of(tmp_path / "global_step12")
    assert weights.progress == {"step": 12, "samples": 24}
    assert set(weights.names) == state.keys()
    for name in weights.names:
        assert weights.tensor(name).equal(state[name]), name


def test_megatron_deepspeeds_spelling(llama: PreTrainedModel, tmp_path: Path) -> None:
    """By megatron/arguments.py of deepspeedai/Megatron-DeepSpeed."""
    removed = dict.fromkeys(("group_query_attention", "num_query_groups", "rotary_base"), ...)
    args = options(llama.config, normalization="rmsnorm", num_experts=[1], rope_theta=500000.0,
                   num_key_value_heads=llama.config.num_key_value_heads, **removed)  # fmt: skip
    write_zero_1(tmp_path, rank_weights(llama.state_dict(), llama.config, LEGACY, 2), args, data=3)
    weights = weights_of(tmp_path / "global_step12")
    assert weights.model.rope_global.theta == 500000
    for name in weights.names:
        assert weights.tensor(name).equal(llama.state_dict()[name]), name


def test_tied_embeddings_and_precision_stay(tmp_path: Path) -> None:
    llama = save_theirs(LlamaConfig(**SIZES, tie_word_embeddings=True), tmp_path / "llama").bfloat16()
    write_megatron(tmp_path, rank_weights(llama.state_dict(), llama.config, CORE, 2), options(llama.config))
    weights = weights_of(tmp_path)
    assert weights.model.tie_word_embeddings
    assert "lm_head.weight" not in weights.names
    for name in weights.names:
        assert weights.tensor(name).equal(llama.state_dict()[name])
        assert weights.dtype(name) == torch.bfloat16


def test_options_become_the_configuration(llama: PreTrainedModel, tmp_path: Path) -> None:
    shards = rank_weights(llama.state_dict(), llama.config, CORE, 1)
    args = options(llama.config, rotary_base=500000, use_rope_scaling=True, rope_scaling_factor=32.0, norm_epsilon=1e-6)
    write_megatron(tmp_path, shards, args)
    model = model_of(opened(tmp_path), None, ["--model.pattern=GLLL", "--model.window=7"])
    assert (model.pattern, model.window, model.rms_norm_eps, model.num_kv_heads) == ("GLLL", 7, 1e-6, 2)
    rope = model.rope_global
    assert (rope.theta, rope.scaling, rope.factor) == (500000, "llama3", 32)
    assert (rope.low_freq_factor, rope.high_freq_factor, rope.original_max_position_embeddings) == (1, 4, 8192)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "GELU": ({"swiglu": False}, r"swiglu=False: only SwiGLU"),
    "LayerNorm": ({"normalization": "LayerNorm"}, r"normalization='LayerNorm': only RMSNorm"),
    "neighbours rotate": (
        {"rotary_interleaved": True},
        r"rotary_interleaved=True: the first half of a head",
    ),
    "learned positions": ({"position_embedding_type": "learned_absolute"}, r"only rotary embeddings"),
    "experts": ({"num_experts": 8}, r"num_experts=8: no experts"),
    "half a head": ({"rotary_percent": 0.5}, r"rotary_percent=0.5"),
    "no width": ({"hidden_size": ...}, r"hidden_size is missing"),
    "no vocabulary": ({"vocab_size": None}, r"\(padded_vocab_size=128\); give --model.vocab_size"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_options_that_we_cannot_represent_are_named(llama: PreTrainedModel, case: str, tmp_path: Path) -> None:
    changes, message = REFUSED[case]
    write_megatron(tmp_path, [{"embedding.word_embeddings.weight": torch.ones(2, 2)}], options(llama.config, **changes))
    with pytest.raises(UserError, match=message):
        model_of(opened(tmp_path), None, [])


def test_what_the_options_refuse_no_other_description_allows(llama: PreTrainedModel, tmp_path: Path) -> None:
    """Shapes are the same: only the options tell that neighbours rotate."""
    llama.config.save_pretrained(tmp_path / "llama")
    shards = rank_weights(llama.state_dict(), llama.config, CORE, 1)
    write_megatron(tmp_path / "megatron", shards, options(llama.config, rotary_interleaved=True))
    with pytest.raises(UserError, match=r"rotary_interleaved=True"):
        model_of(opened(tmp_path / "megatron"), tmp_path / "llama", [])


def test_layouts_that_we_do_not_know_are_named(llama: PreTrainedModel, tmp_path: Path) -> None:
    shards = rank_weights(llama.state_dict(), llama.config, CORE, 2)
    args = options(llama.config)
    folder = write_megatron(tmp_path / "good", shards, args)
    with pytest.raises(CheckpointError, match=r"mlp.linear_fc1.weight has shape \[40, 32\] .* asks for \[48, 32\]"):
        weights_of(folder, "--model.ffn_hidden_size=48")
    with pytest.raises(CheckpointError, match=r"2 tensor-parallel ranks do not divide model.num_kv_heads=1"):
        weights_of(folder, "--model.num_kv_heads=1")
    with pytest.raises(CheckpointError, match=r"no place for: decoder.layers.3.*on rank 0"):
        weights_of(folder, "--model.num_layers=3")
    with pytest.raises(CheckpointError, match=r"word_embeddings.weight has shape \[64, 32\] .* asks for \[65, 32\]"):
        weights_of(folder, "--model.vocab_size=129")

    del shards[1]["decoder.layers.2.mlp.linear_fc2.weight"]
    write_megatron(tmp_path / "less", shards, args)
    with pytest.raises(CheckpointError, match=r"layers.2.mlp.linear_fc2.weight is missing on tensor-parallel rank 1"):
        weights_of(tmp_path / "less")
    write_megatron(tmp_path / "other", [{"transformer.wte.weight": torch.ones(2, 2)}], args)
    with pytest.raises(CheckpointError, match=r"neither Llama's nor Megatron's: transformer.wte.weight"):
        weights_of(tmp_path / "other")
    write_megatron(tmp_path / "old", [{}], args, checkpoint_version=1.0)
    with pytest.raises(CheckpointError, match="versions below 2 order queries, keys and values differently"):
        weights_of(tmp_path / "old")


def test_folders_that_are_split_otherwise_are_named(llama: PreTrainedModel, tmp_path: Path) -> None:
    folder = write_megatron(tmp_path, rank_weights(llama.state_dict(), llama.config, CORE, 2), options(llama.config))
    os.rename(folder / "mp_rank_00", folder / "mp_rank_00_000")
    with pytest.raises(CheckpointError, match="mp_rank_00_000 belongs to a stage of a pipeline or to experts"):
        read_foreign(tmp_path)
    os.rename(folder / "mp_rank_00_000", tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="has no mp_rank_00; copy the folder again"):
        read_foreign(tmp_path)
    (folder / ".metadata").touch()
    with pytest.raises(CheckpointError, match="distributed formats; convert it with --ckpt-convert-format torch"):
        read_foreign(tmp_path)
    os.rename(folder, tmp_path / "iter_0000011")
    with pytest.raises(CheckpointError, match=r"iter_0000012 is not there, which .*_iteration.txt names"):
        read_foreign(tmp_path)
    assert read_foreign(tmp_path / "elsewhere") is None
