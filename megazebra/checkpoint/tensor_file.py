"""Parts of the tensors in a safetensors file, read into memory of their own; and what its checksum should be.

The safetensors library maps whole files, and every page that was touched stays with the process until the file is
closed. Who reads one block after another of files larger than its memory needs to know what it holds.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from megazebra.checkpoint.regions import Span, copy_overlap
from megazebra.durable import errors_name

BLOCK_ELEMENTS = 1 << 22  # of which one is in memory at a time

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
        with errors_name(self.file), self.file.open("rb") as file:
            file.seek(self.position + start * self.dtype.itemsize)
            read = file.readinto(values.view(torch.uint8).numpy().data)
        if read != values.nbytes:
            raise OSError(None, f"ends after {read} of {values.nbytes} bytes of a tensor", str(self.file))
        return values

    def copy_overlap(self, source: Span, target: Span, target_values: Tensor, block_elements: int) -> int:
        """As `regions.copy_overlap` from this tensor, which holds `source`: of its blocks only those that hold some of
        the target are read, one after another.
        """
        copied = 0
        for start in range(0, source.count, block_elements):
            block = replace(source, start=source.start + start, count=min(block_elements, source.count - start))
            if block.overlaps(target):
                values = self.read(start, block.count).to(target_values.device)
                copied += copy_overlap(block, values, target, target_values)
                del values  # before the next block is read
        return copied


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
            if entry["dtype"] not in _DTYPES:
                raise ValueError(f"{key} has dtype {entry['dtype']}, which is not read; take unquantized weights")
            dtype, shape, (begin, end) = _DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
            if not all(isinstance(number, int) and number >= 0 for number in (*shape, begin, end)):
                raise ValueError(f"{key} has a shape or bytes that are no counts")
            if end - begin != prod(shape) * dtype.itemsize or end > size - 8 - header_bytes:
                raise ValueError(f"{key} has shape {list(shape)} and bytes {begin} to {end}")
            tensors[key] = StoredTensor(path, dtype, shape, 8 + header_bytes + begin)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is no safetensors file we can read: {error!r}") from error
    return tensors


def intended_crc32(path: Path, tensors: Mapping[str, Tensor]) -> int:
    """CRC-32 of a safetensors file that holds `tensors` (on the CPU, contiguous) exactly as they are in memory.

    Of the file only the header is read: what went wrong with the rest on its way to the disk shows as damage later.
    """
    positions = {key: stored.position for key, stored in stored_tensors(path).items()}
    assert positions.keys() == tensors.keys()
    with path.open("rb") as file:
        crc = zlib.crc32(file.read(min(positions.values())))
    for key in sorted(positions, key=positions.__getitem__):
        crc = zlib.crc32(tensors[key].view(-1).view(torch.uint8).numpy().data, crc)
    return crc
