"""Parts of the tensors in a safetensors file, read into memory of their own.

The safetensors library maps whole files, and every page that was touched stays with the process until the file is
closed. Who reads one block after another of files larger than its memory needs to know what it holds.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a file; `position` is its first byte there."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    position: int

    def read(self, start: int, count: int) -> Tensor:
        """Elements [start, start + count) of the flattened tensor.

        Raises OSError when the file cannot be read or ends before them.
        """
        assert 0 <= start <= start + count <= prod(self.shape)
        values = torch.empty(count, dtype=self.dtype)
        with self.file.open("rb") as file:
            file.seek(self.position + start * self.dtype.itemsize)
            read = file.readinto(values.view(torch.uint8).numpy().data)
        if read != values.nbytes:
            raise OSError(None, f"ends after {read} of {values.nbytes} bytes of a tensor", str(self.file))
        return values


def stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file by key; reads the header only.

    Raises ValueError when it is no such file, OSError when it cannot be read.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        if header_bytes > size - 8:
            raise ValueError(f"{path} is no safetensors file: its header is longer than the file")
        header = file.read(header_bytes)
    tensors = {}
    try:
        for key, entry in json.loads(header).items():
            if key == "__metadata__":
                continue
            dtype, shape, (begin, end) = _DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
            if end - begin != prod(shape) * dtype.itemsize or not 0 <= begin <= end <= size - 8 - header_bytes:
                raise ValueError(f"{key} has shape {list(shape)} and bytes {begin} to {end}")
            tensors[key] = StoredTensor(path, dtype, shape, 8 + header_bytes + begin)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no safetensors file we can read: {error!r}") from error
    return tensors
