"""Checkpoints that real engines wrote under several layouts, read back as whole tensors; and damaged ones."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import STEPS, Truth

from megazebra.checkpoint import reader
from megazebra.checkpoint.reader import TrainingCheckpoint
from megazebra.checkpoint.store import CheckpointError, read_index, write_index
from megazebra.config.schema import Config
from megazebra.durable import file_crc32


# Blocks of any size must give the same: 13 divides nothing here.
@pytest.mark.parametrize("block", [13, reader.BLOCK_ELEMENTS])
def test_whole_tensors_are_those_of_the_run(
    run: tuple[Config, Truth], block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "BLOCK_ELEMENTS", block)
    config, truth = run
    checkpoint = TrainingCheckpoint.open(config.run.dir)
    assert checkpoint.config == config
    assert checkpoint.progress == {"step": STEPS, "samples": STEPS * 4, "tokens": STEPS * 128}
    assert checkpoint.names == list(truth.weights)
    precision = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    for name, weight in truth.weights.items():
        assert checkpoint.shape(name) == weight.shape
        assert checkpoint.tensor(name, dtype=precision).equal(weight.to(precision)), name
        assert set(checkpoint.states(name)) == truth.states[name].keys()
        assert checkpoint.scalars(name) == {"step": STEPS}
        for what, expected in truth.states[name].items():
            read = checkpoint.tensor(name, what)
            assert read.dtype == torch.float32
            assert read.equal(expected), (name, what)


def test_opens_a_run_its_checkpoints_and_one_step(runs: dict[str, tuple[Config, Truth]], tmp_path: Path) -> None:
    run_dir = Path(runs["one-process"][0].run.dir)
    step = run_dir / "checkpoints" / f"step_{STEPS:08d}"
    for path in (run_dir, run_dir / "checkpoints", step):
        assert TrainingCheckpoint.open(path).folder == step
    with pytest.raises(CheckpointError, match=f"{tmp_path} is no training checkpoint"):
        TrainingCheckpoint.open(tmp_path)


def test_every_file_is_compared_with_its_checksum_once(sharded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    verified: list[str] = []
    genuine = reader.verify_file

    def counting(folder: Path, name: str, index: dict[str, Any]) -> Path:
        verified.append(name)
        return genuine(folder, name, index)

    monkeypatch.setattr(reader, "verify_file", counting)
    checkpoint = TrainingCheckpoint.open(sharded)
    assert verified == [], "opening reads headers only"
    for name in checkpoint.names:
        checkpoint.tensor(name)
    told: list[int] = []
    checkpoint.verify(told.append)
    assert sorted(verified) == sorted(checkpoint.files)
    assert sum(told) == sum(path.stat().st_size for path in sharded.glob("*.safetensors"))


def flip_a_bit(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 16
    path.write_bytes(content)


def put_another_in_its_place(path: Path) -> None:
    size = path.stat().st_size
    path.write_bytes(path.with_name("tp_000_dp_000_00.safetensors").read_bytes().ljust(size)[:size])


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: path.unlink(), "is missing"),
    "cut short": (lambda path: path.write_bytes(path.read_bytes()[:-4]), "has .* bytes, .* were written"),
    "a bit of the data": (lambda path: flip_a_bit(path, -5), "is damaged"),
    "a bit of a key": (lambda path: flip_a_bit(path, path.read_bytes().index(b"exp_avg")), "is damaged"),
    "a bit of a name": (lambda path: flip_a_bit(path, path.read_bytes().index(b"layers.1") + 7), "is damaged"),
    "a bit of the header's length": (lambda path: flip_a_bit(path, 5), "is damaged"),
    "a bit of the header's shape": (lambda path: flip_a_bit(path, path.read_bytes().index(b"]")), "is damaged"),
    "another rank's, made as long": (put_another_in_its_place, "is damaged"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_names_the_file(sharded: Path, damage: str) -> None:
    act, message = DAMAGE[damage]
    path = sharded / "tp_001_dp_001_00.safetensors"
    act(path)
    with pytest.raises(CheckpointError, match=f"{path.name} ({message})"):
        read_all(sharded)


def read_all(folder: Path) -> None:
    checkpoint = TrainingCheckpoint.open(folder)
    for name in checkpoint.names:
        for what in checkpoint.states(name):
            checkpoint.tensor(name, what)


NAME = "model.layers.2.mlp.up_proj.weight"


def rewrite(folder: Path, file: str, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change what a file holds and its entry in the index: whole files with wrong contents."""
    path = folder / file
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    index = read_index(folder)
    index["files"][file] = {"bytes": path.stat().st_size, "crc32": file_crc32(path)}
    write_index(folder, index)


def key_of(tensors: dict[str, torch.Tensor], name: str) -> str:
    return next(key for key in tensors if key.startswith(f"{name}|") and key.endswith("|master"))


def forget(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[key_of(tensors, NAME)]


def shift(tensors: dict[str, torch.Tensor]) -> None:
    key = key_of(tensors, NAME)
    name, start, what = key.split("|")
    tensors[f"{name}|{int(start) - 10}|{what}"] = tensors.pop(key)


def test_pieces_that_are_no_whole_weight_are_named(sharded: Path) -> None:
    half = 96 * 64 // 4  # two tensor-parallel ranks, of whose shards two data-parallel ranks hold half each
    rewrite(sharded, "tp_001_dp_001_00.safetensors", forget)
    with pytest.raises(
        CheckpointError,
        match=f"master of {NAME}, tensor-parallel rank 1: its files hold {half:,} of {2 * half:,} elements",
    ):
        read_all(sharded)
    rewrite(sharded, "tp_000_dp_001_00.safetensors", shift)
    with pytest.raises(
        CheckpointError,
        match=f"master of {NAME}, .*tp_000_dp_001.* begins at element {half - 10}: elements {half - 10} to {half - 1} "
        "are held twice",
    ):
        TrainingCheckpoint.open(sharded).tensor(NAME)
    rewrite(sharded, "tp_000_dp_000_00.safetensors", forget)
    with pytest.raises(CheckpointError, match=f"{NAME}, .*tp_000_dp_001.* elements 0 to {half - 11} are missing"):
        TrainingCheckpoint.open(sharded).tensor(NAME)


def test_a_weight_that_no_file_holds_is_named(sharded: Path) -> None:
    for path in sharded.glob("*.safetensors"):
        rewrite(sharded, path.name, forget)
    with pytest.raises(CheckpointError, match=f"no file holds any of {NAME}"):
        TrainingCheckpoint.open(sharded)


def test_counts_of_a_damaged_file_are_not_read(sharded: Path) -> None:
    flip_a_bit(sharded / "tp_000_dp_000_00.safetensors", -5)
    checkpoint = TrainingCheckpoint.open(sharded)
    with pytest.raises(CheckpointError, match=r"tp_000_dp_000_00\.safetensors is damaged"):
        checkpoint.scalars(NAME)


def test_foreign_contents_are_named(sharded: Path, tmp_path: Path) -> None:
    file = "tp_001_dp_000_00.safetensors"
    foreign = tmp_path / "foreign"
    shutil.copytree(sharded, foreign)
    rewrite(foreign, file, lambda tensors: tensors.update({"other.weight|0|master": torch.zeros(3)}))
    with pytest.raises(CheckpointError, match=f"{file} holds a piece of other.weight, of which index.json knows noth"):
        TrainingCheckpoint.open(foreign)
    rewrite(sharded, file, lambda tensors: tensors.update({"no key of ours": torch.zeros(3)}))
    with pytest.raises(CheckpointError, match=f"{file} is not a file of this checkpoint"):
        TrainingCheckpoint.open(sharded)
    index = read_index(sharded)
    del index["layout"]
    write_index(sharded, index)
    with pytest.raises(CheckpointError, match=r"index\.json is damaged, or written by another version.*layout"):
        TrainingCheckpoint.open(sharded)
