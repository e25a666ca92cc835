"""DeepSpeed's ZeRO folders, read without DeepSpeed, beside what the engines held and what its own script reads."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from foreign.zero_writer import LAYOUTS, STEPS
from support.checkpoints import Truth

from megazebra.checkpoint import tensor_file
from megazebra.checkpoint.merge import Merge
from megazebra.checkpoint.model_folder import ModelFolder
from megazebra.checkpoint.store import CheckpointError
from megazebra.config.schema import Config, ModelConfig
from megazebra.foreign import shards
from megazebra.foreign.opening import read_foreign, whole_weights
from megazebra.foreign.shards import ForeignWeights

Folders = dict[str, tuple[Config, Truth]]


def open_zero(folder: str | Path, model: ModelConfig) -> ForeignWeights:
    sharded = read_foreign(Path(folder))
    assert sharded is not None
    return whole_weights(sharded, model)


@pytest.mark.parametrize("layout", [layout for layouts in LAYOUTS.values() for layout in layouts])
def test_weights_and_moments_are_those_of_the_engine(
    zero_folders: Folders, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "BLOCK_ELEMENTS", 509)  # divides nothing here
    config, truth = zero_folders[layout]
    weights = open_zero(config.run.dir, config.model)
    assert weights.progress == {"step": STEPS, "samples": STEPS * 4}
    assert weights.names == list(truth.states)
    for name, states in truth.states.items():
        assert set(weights.states(name)) == states.keys()
        assert weights.scalars(name) == {"step": STEPS}
        assert weights.dtype(name) == torch.float32
        for what, expected in states.items():
            assert weights.tensor(name, what).equal(expected), (name, what)


@pytest.mark.parametrize("layout", LAYOUTS[2])
def test_weights_are_those_of_deepspeeds_own_script(zero_folders: Folders, layout: str) -> None:
    config, _ = zero_folders[layout]
    expected = get_fp32_state_dict_from_zero_checkpoint(config.run.dir)
    weights = open_zero(config.run.dir, config.model)
    assert set(weights.names) == expected.keys() - {"model.rotary_emb.inv_freq"}
    for name in weights.names:
        assert weights.tensor(name).equal(expected[name]), name


def test_model_folders_hold_all_of_it(zero_folders: Folders, tmp_path: Path) -> None:
    config, truth = zero_folders["tp2-dp2-zero3"]
    Merge(open_zero(config.run.dir, config.model), tmp_path / "model", torch.bfloat16, with_optimizer=True).write(10**9)
    for folder, what in (("model", "master"), ("model-master", "master"), ("model-exp_avg_sq", "exp_avg_sq")):
        written = ModelFolder.open(tmp_path / folder)
        assert written.config == config.model
        for name, states in truth.states.items():
            assert written.tensor(name).equal(states[what].to(written.dtype(name))), (folder, name)


def test_nothing_is_read_that_is_not_asked_for(zero_folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    config, truth = zero_folders["tp2-dp2-zero3"]
    read: list[int] = []
    genuine = tensor_file.StoredTensor.read

    def counting(stored: tensor_file.StoredTensor, start: int, count: int) -> torch.Tensor:
        read.append(count)
        return genuine(stored, start, count)

    monkeypatch.setattr(tensor_file.StoredTensor, "read", counting)
    weights = open_zero(config.run.dir, config.model)
    assert set(read) <= {1}, "counts of updates only"
    read.clear()
    name = "model.layers.1.mlp.down_proj.weight"
    weights.tensor(name)
    assert sum(read) == truth.weights[name].numel()


@pytest.fixture
def copy(zero_folders: Folders, tmp_path: Path) -> tuple[Path, ModelConfig]:
    """A folder to be damaged."""
    config, _ = zero_folders["tp2-dp2-zero1"]
    return Path(shutil.copytree(Path(config.run.dir) / f"global_step{STEPS}", tmp_path / "copy")), config.model


def test_what_is_missing_or_damaged_is_named(copy: tuple[Path, ModelConfig]) -> None:
    folder, model = copy
    file = folder / "bf16_zero_pp_rank_1_mp_rank_01_optim_states.pt"
    content = file.read_bytes()
    file.write_bytes(content[:-100])
    with pytest.raises(CheckpointError, match=f"{file} is damaged, or no file that torch.save"):
        open_zero(folder, model)
    file.unlink()
    with pytest.raises(CheckpointError, match=r"has no \*zero_pp_rank_1_mp_rank_01_optim_states"):
        open_zero(folder, model)
    for path in folder.glob("bf16_zero_pp_rank_1_*"):
        path.unlink()
    with pytest.raises(CheckpointError, match="is one of 2 ranks' files, and 1 are there"):
        open_zero(folder, model)
    for path in folder.glob("*_optim_states.pt"):
        path.unlink()
    with pytest.raises(CheckpointError, match=r"has no \*_optim_states.pt, in which ZeRO keeps"):
        open_zero(folder, model)


def test_another_model_is_refused(copy: tuple[Path, ModelConfig]) -> None:
    folder, model = copy
    wider = model.model_copy(update={"ffn_hidden_size": 128})
    with pytest.raises(
        CheckpointError,
        match=r"mlp.gate_proj.weight has shape \[48, 64\] on tensor-parallel rank 0 of 2, .* \[64, 64\]",
    ):
        open_zero(folder, wider)
    shallower = model.model_copy(update={"num_layers": 1, "pattern": "G"})
    with pytest.raises(CheckpointError, match=r"no place for: model.layers.1.self_attn.q_proj.weight on rank 0"):
        open_zero(folder, shallower)
    untied = model.model_copy(update={"tie_word_embeddings": False})
    with pytest.raises(CheckpointError, match=r"lm_head.weight is missing on tensor-parallel rank 0"):
        open_zero(folder, untied)
