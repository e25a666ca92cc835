"""Parts of tensors out of files that the safetensors library wrote."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megazebra.checkpoint.tensor_file import intended_crc32, stored_tensors
from megazebra.durable import file_crc32

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32]


def test_parts_of_every_dtype(tmp_path: Path) -> None:
    tensors = {str(dtype): torch.arange(60).view(5, 12).to(dtype) for dtype in DTYPES}
    tensors |= {"scalar": torch.tensor(3.5), "empty": torch.empty(0, 4)}
    save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "pt"})
    stored = stored_tensors(tmp_path / "a.safetensors")
    assert stored.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert stored[key].dtype == tensor.dtype
        assert stored[key].shape == tensor.shape
        assert stored[key].read(0, tensor.numel()).equal(tensor.flatten())
    for dtype in DTYPES:
        assert stored[str(dtype)].read(7, 20).equal(torch.arange(7, 27).to(dtype))


def test_the_intended_checksum_is_that_of_the_file_unless_its_data_changed(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    tensors = {str(dtype): torch.arange(60).to(dtype) for dtype in DTYPES}
    tensors |= {"scalar": torch.tensor(3.5), "empty": torch.empty(0)}
    save_file(tensors, path)
    assert intended_crc32(path, tensors) == file_crc32(path)
    changed = path.read_bytes()[:-1] + b"?"
    path.write_bytes(changed)
    assert intended_crc32(path, tensors) != file_crc32(path)


def test_what_is_no_whole_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(100)}, path)
    content = path.read_bytes()
    (stored,) = stored_tensors(path).values()

    path.write_bytes(content[:-4])
    with pytest.raises(ValueError, match=f"{path} is no safetensors file we can read.*a has shape"):
        stored_tensors(path)
    with pytest.raises(OSError, match="ends after 196 of 200 bytes of a tensor") as cut:
        stored.read(50, 50)
    assert cut.value.filename == str(path)

    path.write_bytes(content[:40])
    with pytest.raises(ValueError, match="its header is longer than the file"):
        stored_tensors(path)
    path.write_bytes(content[:8] + b"[" + content[9:])
    with pytest.raises(ValueError, match=f"{path} is no safetensors file we can read"):
        stored_tensors(path)


def test_header_that_does_not_fit_itself(tmp_path: Path) -> None:
    for entry in (
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]},
        {"dtype": "F8_E4M3", "shape": [8], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2]},
    ):
        header = json.dumps({"a": entry}).encode()
        path = tmp_path / "a.safetensors"
        path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
        with pytest.raises(ValueError, match=f"{path} is no safetensors file we can read"):
            stored_tensors(path)
