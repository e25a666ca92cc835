"""Whole weights in safetensors files, laid out as Hugging Face does, read and written one tensor at a time.

    FOLDER/
      model-00001-of-00002.safetensors
      model-00002-of-00002.safetensors
      model.safetensors.index.json       which file has which weight

A folder with one model.safetensors and no index is read as well.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from megazebra.checkpoint.store import CheckpointError
from megazebra.checkpoint.tensor_file import StoredTensor, stored_tensors
from megazebra.durable import errors_name, is_file_name, write_synced

INDEX_NAME = "model.safetensors.index.json"
MAX_FILE_BYTES = 5 * 10**9
_SINGLE_NAME = "model.safetensors"
# Room for the header of a file that is written before its tensors are known; a file that fills it is closed.
_HEADER_BYTES = 1 << 16
_DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
}


def find_weights(folder: Path) -> dict[str, StoredTensor]:
    """The weights of a folder by name; reads headers only.

    Raises CheckpointError, naming the file, when one is missing or no safetensors file, or the index is wrong.
    """
    if (folder / _SINGLE_NAME).exists():
        return _tensors_of(folder / _SINGLE_NAME)
    index_path = folder / INDEX_NAME
    if not index_path.exists():
        pickled = sorted(folder.glob("*.bin")) + sorted(folder.glob("*.pth"))
        mend = f"; {pickled[0].name} is a pickle: save the model again as safetensors" if pickled else ""
        raise CheckpointError(f"{folder} has neither {_SINGLE_NAME} nor {INDEX_NAME}{mend}")
    try:
        file_of: dict[str, str] = json.loads(index_path.read_text())["weight_map"]
        if not all(is_file_name(name) for name in file_of.values()):
            raise ValueError("its weight_map names files that are not beside it")
        files = {name: _tensors_of(folder / name) for name in dict.fromkeys(file_of.values())}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{index_path} is damaged: {error!r}") from error
    weights: dict[str, StoredTensor] = {}
    for file, tensors in files.items():
        named = {name for name, other in file_of.items() if other == file}
        for name in sorted(named ^ tensors.keys()):
            wrong = "is not in it" if name in named else f"is in it, unknown to {INDEX_NAME}"
            raise CheckpointError(f"{folder / file} does not fit {INDEX_NAME}: {name} {wrong}")
        weights |= tensors
    return weights


def _tensors_of(path: Path) -> dict[str, StoredTensor]:
    if not path.exists():
        raise CheckpointError(f"{path} is missing")
    try:
        return stored_tensors(path)
    except ValueError as error:
        raise CheckpointError(str(error)) from error


class WeightFilesWriter:
    """Weights going into files of at most `max_file_bytes` (a larger weight has a file of its own) as they come.

    dtype: what floating-point weights are converted to; None leaves them.
    """

    def __init__(self, folder: Path, max_file_bytes: int, dtype: torch.dtype | None) -> None:
        self.folder = folder
        self.max_file_bytes = max_file_bytes
        self.dtype = dtype
        self._files: list[dict[str, Any]] = []  # the header of each
        self._open: BinaryIO | None = None
        self._header_bytes = self._data_bytes = self._total_bytes = 0

    def write(self, name: str, tensor: Tensor) -> None:
        """Append a weight. Raises OSError, naming the file, when it cannot be written."""
        assert all(name not in header for header in self._files), f"{name} is written twice"
        if self.dtype is not None and tensor.is_floating_point():
            tensor = tensor.to(self.dtype)
        values = tensor.detach().cpu().contiguous()
        entry: dict[str, Any] = {"dtype": _DTYPE_NAMES[values.dtype], "shape": list(values.shape)}
        header_bytes = len(json.dumps({name: entry})) + 64  # two offsets
        if (
            self._open is None
            or self._header_bytes + header_bytes > _HEADER_BYTES
            or (self._data_bytes and self._data_bytes + values.nbytes > self.max_file_bytes)
        ):
            self._close_file()
            self._begin_file()
        assert self._open is not None
        with errors_name(self._path(len(self._files))):
            self._open.write(values.view(-1).view(torch.uint8).numpy().data)
        entry["data_offsets"] = [self._data_bytes, self._data_bytes + values.nbytes]
        self._files[-1][name] = entry
        self._header_bytes += header_bytes
        self._data_bytes += values.nbytes
        self._total_bytes += values.nbytes

    def finish(self) -> None:
        """Close the last file, name all files by their number, and write the index."""
        self._close_file()
        file_of: dict[str, str] = {}
        for number, header in enumerate(self._files, start=1):
            name = f"model-{number:05d}-of-{len(self._files):05d}.safetensors"
            self._path(number).rename(self.folder / name)
            file_of |= {weight: name for weight in header if weight != "__metadata__"}
        index = {"metadata": {"total_size": self._total_bytes}, "weight_map": dict(sorted(file_of.items()))}
        write_synced(self.folder / INDEX_NAME, json.dumps(index, indent=2).encode())

    def abandon(self) -> None:
        if self._open is not None:
            self._open.close()

    def _begin_file(self) -> None:
        self._files.append({"__metadata__": {"format": "pt"}})  # transformers reads no file without it
        self._header_bytes, self._data_bytes = 128, 0
        with errors_name(self._path(len(self._files))):
            self._open = self._path(len(self._files)).open("wb")
            self._open.seek(_HEADER_BYTES)

    def _close_file(self) -> None:
        if self._open is None:
            return
        header = json.dumps(self._files[-1]).encode()
        assert len(header) <= _HEADER_BYTES - 8
        with errors_name(self._path(len(self._files))), self._open as file:
            file.seek(0)
            file.write((_HEADER_BYTES - 8).to_bytes(8, "little"))
            file.write(header.ljust(_HEADER_BYTES - 8))
        self._open = None

    def _path(self, number: int) -> Path:
        return self.folder / f"model-{number:05d}.safetensors"


@contextmanager
def writing_weights(
    folder: Path, max_file_bytes: int = MAX_FILE_BYTES, dtype: torch.dtype | None = None
) -> Iterator[WeightFilesWriter]:
    """A writer whose files and index are complete when the block ends without an error."""
    writer = WeightFilesWriter(folder, max_file_bytes, dtype)
    try:
        yield writer
        writer.finish()
    finally:
        writer.abandon()
