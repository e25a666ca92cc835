"""Files of pieces: of bounded size, on the disk, with the checksum of what was in memory."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megazebra.checkpoint import fragments
from megazebra.checkpoint.fragments import write_pieces
from megazebra.config.schema import ParallelConfig
from megazebra.durable import file_crc32
from megazebra.parallel.mesh import ParallelMesh

ELEMENTS = 1000
TENSORS = {
    f"layers.{layer}|{layer * 7}|{what}": torch.randn(ELEMENTS if what != "step" else ())
    for layer in range(5)
    for what in ("master", "exp_avg", "step")
}


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that were synced; two pieces fit in a file."""
    names: list[str] = []
    genuine = fragments.sync_file

    def sync(path: Path) -> None:
        genuine(path)
        names.append(path.name)

    monkeypatch.setattr(fragments, "sync_file", sync)
    monkeypatch.setattr(fragments, "MAX_FILE_BYTES", 2 * (2 * 4 * ELEMENTS + 4))
    return names


def test_every_file_is_synced_and_described(tmp_path: Path, synced: list[str]) -> None:
    entries = write_pieces(TENSORS, tmp_path, ParallelMesh.build(ParallelConfig()))
    assert synced == [path.name for path in entries] == sorted(path.name for path in tmp_path.iterdir())
    assert len(synced) == 3
    found: dict[str, Tensor] = {}
    for number, (path, entry) in enumerate(entries.items()):
        assert entry["bytes"] == path.stat().st_size
        assert entry["crc32"] == file_crc32(path)
        layers = range(2 * number, min(2 * number + 2, 5))
        assert entry["pieces"] == {f"layers.{layer}": [layer * 7, ELEMENTS] for layer in layers}
        found |= load_file(path)
    assert found.keys() == TENSORS.keys()
    assert all(found[key].equal(tensor) for key, tensor in TENSORS.items())


def test_what_changed_on_its_way_to_the_disk_is_damage(
    tmp_path: Path, synced: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def save_with_a_flipped_bit(tensors: dict[str, Tensor], path: Path) -> None:
        save_file(tensors, path)
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)

    monkeypatch.setattr(fragments, "save_file", save_with_a_flipped_bit)
    for path, entry in write_pieces(TENSORS, tmp_path, ParallelMesh.build(ParallelConfig())).items():
        assert entry["crc32"] != file_crc32(path)


def test_a_disk_that_refuses_to_sync_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise OSError(errno.EIO, "Input/output error", str(path))

    monkeypatch.setattr(fragments, "sync_file", refuse)
    with pytest.raises(OSError, match=r"Input/output error.*tp_000_dp_000_00"):
        write_pieces(TENSORS, tmp_path, ParallelMesh.build(ParallelConfig()))
