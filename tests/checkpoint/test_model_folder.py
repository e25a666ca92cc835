"""A model folder holds what was written, says so when it no longer does, and appears whole or not at all."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from models.zebras import small_config
from safetensors.torch import load_file
from torch import Tensor

from megazebra.checkpoint import weight_files
from megazebra.checkpoint.model_folder import ModelFolder, ModelFolderWriter
from megazebra.checkpoint.store import CheckpointError
from megazebra.config import ConfigError

CONFIG = small_config(rope_global={"scaling": "yarn", "factor": 2.0, "original_max_position_embeddings": 32})
WEIGHTS = {
    "a": torch.arange(60, dtype=torch.float32).view(12, 5),
    "b": torch.arange(7, dtype=torch.bfloat16),
    "c": torch.tensor(3.5, dtype=torch.float16),
    "d": torch.arange(9, dtype=torch.int64).view(3, 3).T,  # not contiguous
    "e": torch.empty(0, 4),
}


def write(path: Path, weights: dict[str, Tensor] = WEIGHTS, **options: object) -> ModelFolder:
    with ModelFolderWriter(path, CONFIG, **options) as writer:  # type: ignore[arg-type]
        for name, tensor in weights.items():
            writer.write(name, tensor)
        writer.add_file("tokenizer.json", b"{}")
    return ModelFolder.open(path)


def weight_names(path: Path) -> list[str]:
    return sorted(file.name for file in path.glob("*.safetensors"))


@pytest.mark.parametrize("max_file_bytes", [1, 260, 10**9])
def test_what_was_written_comes_back(tmp_path: Path, max_file_bytes: int) -> None:
    folder = write(tmp_path / "model", max_file_bytes=max_file_bytes)
    assert folder.config == CONFIG
    assert sorted(folder.names) == sorted(WEIGHTS)
    assert (folder.folder / "tokenizer.json").read_bytes() == b"{}"
    for name, expected in WEIGHTS.items():
        assert folder.shape(name) == expected.shape
        assert folder.dtype(name) == expected.dtype
        assert torch.equal(folder.tensor(name), expected)
    folder.verify()


def test_files_are_of_bounded_size_and_hugging_faces_own_library_reads_them(tmp_path: Path) -> None:
    write(tmp_path / "model", max_file_bytes=260)
    # a (240 bytes) and b (14) fit, with c (2); d (72) does not.
    assert weight_names(tmp_path / "model") == [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": sum(tensor.nbytes for tensor in WEIGHTS.values())}
    for file in weight_names(tmp_path / "model"):
        there = load_file(tmp_path / "model" / file)
        assert set(there) == {name for name, other in index["weight_map"].items() if other == file}
        assert all(torch.equal(tensor, WEIGHTS[name]) for name, tensor in there.items())


def test_a_full_header_begins_another_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_files, "_HEADER_BYTES", 512)
    weights = {f"model.layers.{i}.weight": torch.tensor([float(i)]) for i in range(9)}
    folder = write(tmp_path / "model", weights)
    assert len(weight_names(tmp_path / "model")) > 2
    assert all(torch.equal(folder.tensor(name), tensor) for name, tensor in weights.items())


def test_dtype_converts_what_is_floating(tmp_path: Path) -> None:
    folder = write(tmp_path / "model", dtype=torch.bfloat16)
    assert {name: folder.dtype(name) for name in "abcde"} == {
        name: torch.int64 if name == "d" else torch.bfloat16 for name in "abcde"
    }
    assert torch.equal(folder.tensor("a"), WEIGHTS["a"].bfloat16())


MEASURE_MEMORY = """
import resource, sys
from pathlib import Path
import torch
from megazebra.checkpoint.model_folder import ModelFolder, ModelFolderWriter
from megazebra.config import ModelConfig

def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

path, count, elements = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
before = peak()
with ModelFolderWriter(path, ModelConfig()) as writer:
    for i in range(count):
        writer.write(str(i), torch.full((elements,), i, dtype=torch.float32))
folder = ModelFolder.open(path)
for i in range(count):
    assert bool((folder.tensor(str(i)) == i).all())
print(peak() - before)
"""


def test_memory_is_that_of_a_tensor_and_not_of_a_file(tmp_path: Path) -> None:
    count, elements = 16, 1 << 21
    arguments = [str(tmp_path / "model"), str(count), str(elements)]
    command = [sys.executable, "-c", MEASURE_MEMORY, *arguments]
    run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert len(weight_names(tmp_path / "model")) == 1
    tensor, chunk = 4 * elements, 1 << 24  # of the checksum, two of which exist while the next one is read
    # A tensor while the next one is made, and what Python and the allocator keep beside.
    assert int(run.stdout) < 3 * tensor + 2 * chunk < count * tensor


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


WEIGHT_FILE = "model-00002-of-00002.safetensors"


@pytest.mark.parametrize(
    ("damage", "message"),
    [(cut, "bytes were written|were written"), (Path.unlink, "is missing"), (flip, "is damaged")],
)
@pytest.mark.parametrize(
    "file", ["config.yaml", "tokenizer.json", "model.safetensors.index.json", WEIGHT_FILE, "checksums.json"]
)
def test_damage_names_the_file(tmp_path: Path, file: str, damage: Callable[[Path], None], message: str) -> None:
    write(tmp_path / "model", max_file_bytes=260)
    damage(tmp_path / "model" / file)
    if file == "checksums.json":  # has no checksum itself, but no byte of it can go
        message = "is damaged|is no model folder"
    if file == WEIGHT_FILE and damage is flip:  # found when it is read
        folder = ModelFolder.open(tmp_path / "model")
        assert torch.equal(folder.tensor("a"), WEIGHTS["a"])
        with pytest.raises(CheckpointError, match=f"{file}.*{message}"):
            folder.tensor("d")
        with pytest.raises(CheckpointError, match=f"{file}.*{message}"):
            folder.verify()
    else:
        with pytest.raises(CheckpointError, match=f"({file}.*({message}))|is no model folder: it has no {file}"):
            ModelFolder.open(tmp_path / "model")


def test_another_format_or_another_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is no model folder"):
        ModelFolder.open(tmp_path)
    write(tmp_path / "model")
    path = tmp_path / "model" / "checksums.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99}))
    with pytest.raises(CheckpointError, match="has format 99, this version reads 1"):
        ModelFolder.open(tmp_path / "model")


def test_a_configuration_of_another_version_names_its_key(tmp_path: Path) -> None:
    write(tmp_path / "model")
    config, checksums = tmp_path / "model" / "config.yaml", tmp_path / "model" / "checksums.json"
    config.write_text(config.read_text().replace("window:", "windoe:"))
    files = json.loads(checksums.read_text())
    files["files"].pop("config.yaml")
    checksums.write_text(json.dumps(files))
    with pytest.raises(ConfigError, match=r"config.yaml:\d+: unknown key 'model.windoe'; did you mean 'model.window'"):
        ModelFolder.open(tmp_path / "model")


def test_nothing_is_left_of_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path, config: object = CONFIG) -> None:
        with ModelFolderWriter(path, CONFIG) as writer:
            writer.write("a", WEIGHTS["a"])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []

    def full(path: Path, content: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(weight_files, "write_synced", full)
    with pytest.raises(OSError, match=r"No space left.*model.safetensors.index.json"):
        write(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_not_touched(tmp_path: Path) -> None:
    write(tmp_path / "model")
    before = {file.name: file.read_bytes() for file in (tmp_path / "model").iterdir()}
    with pytest.raises(CheckpointError, match="exists; choose another folder, or remove it"):
        write(tmp_path / "model", {"other": torch.ones(1)})
    assert {file.name: file.read_bytes() for file in (tmp_path / "model").iterdir()} == before


def test_a_leftover_of_a_killed_writer_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "model.partial").mkdir()
    (tmp_path / "model.partial" / "model-00001.safetensors").write_bytes(b"half")
    write(tmp_path / "model").verify()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
