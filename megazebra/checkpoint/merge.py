"""From the pieces of a training checkpoint to model folders: whole weights that remember no layout."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from megazebra.checkpoint.model_folder import ModelFolderWriter
from megazebra.config.schema import ModelConfig


class Mergeable(Protocol):
    """A TrainingCheckpoint, or what another trainer left."""

    @property
    def model(self) -> ModelConfig: ...

    @property
    def progress(self) -> dict[str, int]: ...

    @property
    def names(self) -> list[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def states(self, name: str) -> list[str]: ...

    def scalars(self, name: str) -> dict[str, float]: ...

    def tensor(self, name: str, what: str, dtype: torch.dtype | None) -> Tensor: ...


@dataclass(frozen=True)
class Merge:
    """What is merged: the weights in `dtype` into `output`, and with `with_optimizer` the fp32 master weights and every
    moment into folders beside it: output-master, output-exp_avg and so on, each like a model's.

    files: small ones that go beside the weights, by name, such as a tokenizer's.
    """

    checkpoint: Mergeable
    output: Path
    dtype: torch.dtype
    with_optimizer: bool
    files: Mapping[str, bytes] = field(default_factory=dict)

    def folders(self) -> dict[Path, str]:
        """Every folder that is written, and what of each weight goes into it."""
        return {self.output: "master"} | {
            self.output.with_name(f"{self.output.name}-{state}"): state for state in self._states()
        }

    def total_bytes(self) -> int:
        """Size of all tensors that are written."""
        return sum(self._bytes(folder, name) for folder, _, name in self._tensors())

    def write(self, max_file_bytes: int, on_written: Callable[[int], None] = lambda _: None) -> None:
        """Write the folders, one tensor in memory at a time; calls `on_written` with the bytes of each.

        The folders appear at the end, each of them whole, and none when a tensor can't be read. Raises CheckpointError
        when the checkpoint is damaged or a folder exists, OSError when one cannot be written.
        """
        with ExitStack() as open_folders:
            writers = {
                folder: open_folders.enter_context(
                    ModelFolderWriter(folder, self.checkpoint.model, max_file_bytes=max_file_bytes)
                )
                for folder in self.folders()
            }
            for folder, state, name in self._tensors():
                # Without a name for the tensor: it would live until the next one is there too.
                writers[folder].write(name, self.checkpoint.tensor(name, state, self._dtype(folder)))
                on_written(self._bytes(folder, name))
            writers[self.output].add_file("training.json", json.dumps(self._training(), indent=1).encode())
            for name, content in self.files.items():
                writers[self.output].add_file(name, content)

    def _tensors(self) -> Iterator[tuple[Path, str, str]]:
        folders = self.folders()
        for name in self.checkpoint.names:
            for folder, state in folders.items():
                if state in self.checkpoint.states(name):
                    yield folder, state, name

    def _states(self) -> list[str]:
        if not self.with_optimizer:
            return []
        # Not all weights need have the same: Muon has other moments than the AdamW beside it.
        return list(dict.fromkeys(state for name in self.checkpoint.names for state in self.checkpoint.states(name)))

    def _dtype(self, folder: Path) -> torch.dtype:
        return self.dtype if folder == self.output else torch.float32

    def _bytes(self, folder: Path, name: str) -> int:
        return prod(self.checkpoint.shape(name)) * self._dtype(folder).itemsize

    def _training(self) -> dict[str, object]:
        """Where the run was; with the optimizer, also what that counts for every weight."""
        counts = {name: self.checkpoint.scalars(name) for name in self.checkpoint.names if self.with_optimizer}
        return {**self.checkpoint.progress, **({"optimizer": counts} if counts else {})}
