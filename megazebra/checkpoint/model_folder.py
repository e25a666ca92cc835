"""A model on disk that belongs to no run and no layout: whole weights and the configuration to build it.

FOLDER/
  config.yaml                        the configuration's model section
  model-00001-of-00002.safetensors   weights under Hugging Face's names (see weight_files.py)
  model.safetensors.index.json
  tokenizer.json ...                 what else came with the model
  checksums.json                     bytes and CRC-32 of every file above
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from megazebra.checkpoint.new_folder import new_folder
from megazebra.checkpoint.store import CheckpointError
from megazebra.checkpoint.tensor_file import StoredTensor
from megazebra.checkpoint.weight_files import MAX_FILE_BYTES, find_weights, writing_weights
from megazebra.config.loading import load_config
from megazebra.config.schema import ModelConfig
from megazebra.config.yaml_source import to_yaml
from megazebra.durable import file_crc32, is_file_name, write_synced

CONFIG_NAME = "config.yaml"
CHECKSUMS_NAME = "checksums.json"
_FORMAT_VERSION = 1


class ModelFolder:
    """The weights of a model folder, read when they are asked for. `open` makes one.

    config: the model. Memory holds no more than the tensors that the caller keeps.
    """

    def __init__(self, folder: Path, checksums: dict[str, dict[str, int]]) -> None:
        self.folder = folder
        self._checksums = checksums
        self._verified: set[str] = set()
        for name in checksums:
            self._verify(name, content=not name.endswith(".safetensors"))
        # No more than the model is asked about: the default sequence may be longer than the model takes.
        self.config: ModelConfig = load_config(folder / CONFIG_NAME, ["data.seq_len=1"]).model
        self._weights: dict[str, StoredTensor] = find_weights(folder)
        for file in sorted({stored.file.name for stored in self._weights.values()} - checksums.keys()):
            raise CheckpointError(f"{folder / file} has no checksum in {CHECKSUMS_NAME}; make the folder again")

    @property
    def model(self) -> ModelConfig:
        return self.config

    @classmethod
    def open(cls, path: str | Path) -> ModelFolder:
        """The model folder at `path`.

        Raises CheckpointError, naming the file, when it is no model folder, a file is missing or has another size
        than was written, or one of the small ones is damaged; the weights' files are compared with their checksums
        when something in them is first read.
        """
        checksums_path = Path(path) / CHECKSUMS_NAME
        if not checksums_path.exists():
            raise CheckpointError(
                f"{path} is no model folder: it has no {CHECKSUMS_NAME}; tools/convert_hf.py import makes one from a "
                "Hugging Face model, tools/merge_checkpoint.py from a run's checkpoint"
            )
        try:
            content = json.loads(checksums_path.read_text())
            version, files = content["format"], content["files"]
            checksums = {name: {key: int(entry[key]) for key in ("bytes", "crc32")} for name, entry in files.items()}
            if not all(is_file_name(name) for name in checksums):
                raise ValueError("it names files that are not beside it")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise CheckpointError(f"{checksums_path} is damaged: {error!r}; make the folder again") from error
        if version != _FORMAT_VERSION:
            raise CheckpointError(
                f"{checksums_path} has format {version!r}, this version reads {_FORMAT_VERSION}; "
                "read it with the version that wrote it"
            )
        return cls(Path(path), checksums)

    @property
    def names(self) -> list[str]:
        """Hugging Face's names of the weights; of tied ones the first."""
        return list(self._weights)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._weights[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return self._weights[name].dtype

    def tensor(self, name: str) -> Tensor:
        """The whole weight on the CPU, in the dtype it was saved in.

        Raises CheckpointError, naming the file, when that is damaged.
        """
        stored = self._weights[name]
        self._verify(stored.file.name)
        return stored.read(0, prod(stored.shape)).view(stored.shape)

    def verify(self, on_read: Callable[[int], None] = lambda _: None) -> None:
        """Compare all files with their checksums; calls `on_read` with the bytes of each.

        Raises CheckpointError, naming the first one that is damaged.
        """
        for name, entry in self._checksums.items():
            self._verify(name)
            on_read(entry["bytes"])

    def _verify(self, name: str, content: bool = True) -> None:
        if name in self._verified:
            return
        path, entry = self.folder / name, self._checksums[name]
        if not path.exists():
            raise CheckpointError(f"{path} is missing; make the folder again, or copy the file anew")
        size = path.stat().st_size
        if size != entry["bytes"]:
            raise CheckpointError(
                f"{path} has {size} bytes, {entry['bytes']} were written; make the folder again, or copy the file anew"
            )
        if content:
            if file_crc32(path) != entry["crc32"]:
                raise CheckpointError(
                    f"{path} is damaged (its CRC-32 differs); make the folder again, or copy the file anew"
                )
            self._verified.add(name)


class ModelFolderWriter:
    """A new model folder at `path`, which appears when the `with` block ends and leaves nothing when it fails.

    max_file_bytes: of a file of weights; one larger weight has a file of its own.
    dtype: what floating-point weights are converted to; None leaves them.
    Raises CheckpointError when `path` exists, OSError naming the file when the disk is full.
    """

    def __init__(
        self,
        path: str | Path,
        config: ModelConfig,
        *,
        max_file_bytes: int = MAX_FILE_BYTES,
        dtype: torch.dtype | None = None,
    ) -> None:
        self._writing = self._write_folder(Path(path), config, max_file_bytes, dtype)

    def write(self, name: str, tensor: Tensor) -> None:
        """Append a whole weight under Hugging Face's name, in any order, each once."""
        self._weights.write(name, tensor)

    def add_file(self, name: str, content: bytes) -> None:
        """Put a small file beside the weights, such as a tokenizer's."""
        write_synced(self._folder / name, content)

    def __enter__(self) -> ModelFolderWriter:
        self._writing.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._writing.__exit__(kind, error, traceback)

    @contextmanager
    def _write_folder(
        self, path: Path, config: ModelConfig, max_file_bytes: int, dtype: torch.dtype | None
    ) -> Iterator[None]:
        with new_folder(path) as self._folder:
            with writing_weights(self._folder, max_file_bytes, dtype) as self._weights:
                yield
            model: dict[str, Any] = {"model": config.model_dump(mode="json")}
            write_synced(self._folder / CONFIG_NAME, to_yaml(model).encode())
            files = {
                file.name: {"bytes": file.stat().st_size, "crc32": file_crc32(file)}
                for file in sorted(self._folder.iterdir())
            }
            content = json.dumps({"format": _FORMAT_VERSION, "files": files}, indent=1)
            write_synced(self._folder / CHECKSUMS_NAME, content.encode())
