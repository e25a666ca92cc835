"""tools/reshard_checkpoint.py on folders of other trainers, from its command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import reshard_checkpoint
import torch
from foreign.megatron_writer import CORE, options, rank_weights, write_megatron
from hf.hf_models import SIZES, save_theirs
from support.checkpoints import Truth
from transformers import LlamaConfig

from megazebra.checkpoint.model_folder import ModelFolder
from megazebra.config.loading import save_config
from megazebra.config.schema import Config
from megazebra.errors import UserError


def told(output: pytest.CaptureFixture[str], *arguments: object) -> list[str]:
    """The lines it prints."""
    reshard_checkpoint.main([str(argument) for argument in arguments])
    return output.readouterr().out.splitlines()


def test_a_zero_folder_with_its_moments(
    zero_folders: dict[str, tuple[Config, Truth]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, truth = zero_folders["tp2-dp2-zero3"]
    save_config(config, tmp_path / "run.yaml")
    arguments = (config.run.dir, tmp_path / "model", "--model", tmp_path / "run.yaml", "--with-optimizer")
    lines = told(capsys, *arguments, "--dry-run")
    assert "2 tensor- x 2 data-parallel ranks): step 1, 21 weights" in lines[0]
    assert lines[1] == "  pattern GL over 2 layers, vocabulary of 61 tokens"
    assert lines[-2] == f"  to {tmp_path}/model-exp_avg_sq: exp_avg_sq in float32"
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]
    told(capsys, *arguments)
    for name, states in truth.states.items():
        assert ModelFolder.open(tmp_path / "model").tensor(name).equal(states["master"])
        assert ModelFolder.open(tmp_path / "model-exp_avg").tensor(name).equal(states["exp_avg"])
    with pytest.raises(UserError, match=f"{tmp_path}/model exists; choose another folder"):
        told(capsys, *arguments)


def test_a_megatron_folder_by_its_own_options_or_a_hugging_face_config(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    llama = save_theirs(LlamaConfig(**SIZES), tmp_path / "hf")
    shards = rank_weights(llama.state_dict(), llama.config, CORE, 2)
    write_megatron(tmp_path / "megatron", shards, options(llama.config, vocab_size=None))
    with pytest.raises(UserError, match=r"give --model\.vocab_size"):
        told(capsys, tmp_path / "megatron", tmp_path / "model")
    changes = ("--model.vocab_size=61", "--model.pattern=GLLL", "--model.window=7")
    told(capsys, tmp_path / "megatron", tmp_path / "model", "--dtype", "bfloat16", *changes)
    lines = told(capsys, tmp_path / "megatron", tmp_path / "same", "--model", tmp_path / "hf")
    assert lines[2] == f"  to {tmp_path}/same: weights in float32"
    one, same = ModelFolder.open(tmp_path / "model"), ModelFolder.open(tmp_path / "same")
    assert (one.config.pattern, one.config.window, same.config.pattern) == ("GLLL", 7, "G")
    for name, weight in llama.state_dict().items():
        assert one.tensor(name).equal(weight.to(torch.bfloat16))
        assert same.tensor(name).equal(weight)


REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "a layout": (("--tensor", 2), r"--tensor is not read: .* is a folder of another trainer's"),
    "an optimizer": (
        ("--with-optimizer", "--model.vocab_size=61"),
        "has no optimizer state that we read",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_options_that_it_does_not_read_are_refused(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    llama = save_theirs(LlamaConfig(**SIZES), tmp_path / "hf")
    write_megatron(tmp_path, rank_weights(llama.state_dict(), llama.config, CORE, 1), options(llama.config))
    arguments, message = REFUSED[case]
    with pytest.raises(UserError, match=message):
        told(capsys, tmp_path, tmp_path / "model", *arguments)


def test_nothing_says_what_the_model_is(
    zero_folders: dict[str, tuple[Config, Truth]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match="does not say what the model is; give --model"):
        told(capsys, zero_folders["dp2-zero2"][0].run.dir, tmp_path / "model")
