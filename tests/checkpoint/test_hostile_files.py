"""Checkpoints and models whose files name others, or claim more than there is: refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.training import tiny_config

from megazebra.checkpoint.model_folder import ModelFolderWriter
from megazebra.checkpoint.reader import TrainingCheckpoint
from megazebra.checkpoint.store import CheckpointError, read_latest, write_index
from megazebra.checkpoint.tensor_file import stored_tensors
from megazebra.checkpoint.weights import open_weights
from megazebra.durable import file_crc32, is_file_name


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "/etc/passwd", "a/b", "a\\b", "a\0b", None, 3])
def test_a_path_is_no_file_name(name: object) -> None:
    assert not is_file_name(name)
    assert is_file_name("model-00001-of-00002.safetensors")


@pytest.mark.parametrize("content", [b"../../elsewhere", b"", b"step_1", b"\xff\xfe", b"step_00000001/.."])
def test_the_pointer_leads_to_a_checkpoint_or_nowhere(content: bytes, tmp_path: Path) -> None:
    assert read_latest(tmp_path) is None
    (tmp_path / "latest").write_bytes(content)
    with pytest.raises(CheckpointError, match="latest"):
        read_latest(tmp_path)
    with pytest.raises(CheckpointError, match="latest"):
        TrainingCheckpoint.open(tmp_path)


def checkpoint(folder: Path, **changes: Any) -> Path:
    """A checkpoint of one weight, whose index is right but for the changes."""
    folder.mkdir()
    path = folder / "tp_000_dp_000_00.safetensors"
    save_file({"w|0|master": torch.arange(6.0)}, path)
    files = {path.name: {"bytes": path.stat().st_size, "crc32": file_crc32(path), "tensor_rank": 0}}
    index: dict[str, Any] = {
        "format": 3, "files": files, "parameters": {"w": {"shape": [2, 3], "partition_dim": None}},
        "progress": {"step": 1}, "layout": {"tensor": 1}, "config": tiny_config().model_dump(mode="json"),
    }  # fmt: skip
    write_index(folder, {**index, **changes})
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"files": {"../../x": {"bytes": 1, "crc32": 0}}}, "no names of files"),
        ({"files": [1]}, "no names of files"),
        ({"parameters": {"w": {"shape": [[2], 3], "partition_dim": None}}}, "shape="),
        ({"parameters": {"w": {"shape": [-2, -3], "partition_dim": None}}}, "shape="),
        ({"parameters": {"w": {"shape": [6, 1, 1], "partition_dim": None}}}, "shape="),
        ({"parameters": {"w": {"shape": [6], "partition_dim": 1}}}, "partition_dim=1"),
        ({"layout": {"tensor": 0}}, "layout.tensor=0"),
    ],
)
def test_an_index_that_cannot_be_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        TrainingCheckpoint.open(checkpoint(tmp_path / "step", **changes))


@pytest.mark.parametrize("layout", [1, 2**50])
def test_no_memory_is_taken_for_a_shape_that_the_files_do_not_fill(layout: int, tmp_path: Path) -> None:
    huge = {"w": {"shape": [2**30, 2**30], "partition_dim": 0}}
    opened = TrainingCheckpoint.open(checkpoint(tmp_path / "step", parameters=huge, layout={"tensor": layout}))
    with pytest.raises(CheckpointError, match="elements"):
        opened.tensor("w")
    assert torch.equal(
        TrainingCheckpoint.open(checkpoint(tmp_path / "right")).tensor("w"), torch.arange(6.0).view(2, 3)
    )


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [-2, -3], "data_offsets": [0, 24]},
        {"dtype": "F32", "shape": [6.0], "data_offsets": [0, 24]},
        {"dtype": "F32", "shape": [6], "data_offsets": [-24, 0]},
        {"dtype": "F32", "shape": [2**60], "data_offsets": [0, 2**62]},
        {"dtype": "F32", "shape": "6", "data_offsets": [0, 24]},
        [],
    ],
)
def test_a_header_that_claims_what_is_not_there(entry: Any, tmp_path: Path) -> None:
    header = json.dumps({"w": entry}).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(24))
    with pytest.raises(ValueError, match="no safetensors file we can read"):
        stored_tensors(path)


@pytest.mark.parametrize("file", ["model.safetensors.index.json", "checksums.json"])
def test_a_model_names_files_of_its_own(file: str, tmp_path: Path) -> None:
    with ModelFolderWriter(tmp_path / "model", tiny_config().model) as writer:
        writer.write("w", torch.ones(3))
    path = tmp_path / "model" / file
    path.write_text(path.read_text().replace("model-00001-of-00001.safetensors", "../../outside.safetensors"))
    if file != "checksums.json":
        sums = json.loads((tmp_path / "model" / "checksums.json").read_text())
        sums["files"][file] = {"bytes": path.stat().st_size, "crc32": file_crc32(path)}
        (tmp_path / "model" / "checksums.json").write_text(json.dumps(sums))
    with pytest.raises(CheckpointError, match="not beside it"):
        open_weights(tmp_path / "model")


def test_weights_without_a_checksum_are_refused(tmp_path: Path) -> None:
    with ModelFolderWriter(tmp_path / "model", tiny_config().model) as writer:
        writer.write("w", torch.ones(3))
    path = tmp_path / "model" / "checksums.json"
    sums = json.loads(path.read_text())
    sums["files"] = {name: entry for name, entry in sums["files"].items() if not name.endswith(".safetensors")}
    path.write_text(json.dumps(sums))
    with pytest.raises(CheckpointError, match="has no checksum"):
        open_weights(tmp_path / "model")
