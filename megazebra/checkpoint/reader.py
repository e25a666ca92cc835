"""A training checkpoint as whole tensors, whatever layout wrote it: one at a time, without a process group.

Memory is bounded by the tensor that is asked for and one block; only where the pieces lie is kept of all files.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megazebra.checkpoint.regions import Span
from megazebra.checkpoint.store import CheckpointError, read_index, read_latest, verify_file
from megazebra.checkpoint.tensor_file import BLOCK_ELEMENTS, StoredTensor, stored_tensors
from megazebra.config.schema import Config, ModelConfig

_FILE_NAME = re.compile(r"tp_(\d+)_.*\.safetensors")


@dataclass(frozen=True, slots=True)
class _Piece:
    """Elements [start, start + the tensor's) of the flattened shard; a scalar belongs to all of them."""

    start: int
    stored: StoredTensor

    @property
    def end(self) -> int:
        return self.start + prod(self.stored.shape)


class TrainingCheckpoint:
    """The weights of a training checkpoint and what the optimizer knows of each.

    config: the run's. progress: step, samples, tokens. layout: the parallel sizes and ZeRO stage that wrote it.
    files: bytes of each file; it is compared with its checksum before anything in it is used, once.
    """

    def __init__(self, folder: Path, index: dict[str, Any]) -> None:
        self.folder = folder
        self._index = index
        self._verified: set[str] = set()
        try:
            self.config = Config.model_validate(index["config"])
            self.layout: dict[str, int] = index["layout"]
            self.progress: dict[str, int] = index["progress"]
            self.files: dict[str, int] = {name: entry["bytes"] for name, entry in index["files"].items()}
            self._weights = {
                name: _shape_and_split(entry["shape"], entry["partition_dim"])
                for name, entry in index["parameters"].items()
            }
            self._tp_size = self.layout["tensor"]
            if not isinstance(self._tp_size, int) or self._tp_size < 1:
                raise ValueError(f"layout.tensor={self._tp_size!r}")
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise CheckpointError(
                f"{folder}/index.json is damaged, or written by another version: {error!r}"
            ) from error
        # For each weight, for what is held of it, for each tensor-parallel rank.
        self._pieces: dict[str, dict[str, dict[int, list[_Piece]]]] = {name: {} for name in self._weights}
        for file in self.files:
            self._find_pieces(file)
        if absent := [name for name, held in self._pieces.items() if "master" not in held]:
            self.verify()  # damage explains more than what follows from it
            raise CheckpointError(f"{folder}: no file holds any of {absent[0]}")

    @property
    def model(self) -> ModelConfig:
        return self.config.model

    @classmethod
    def open(cls, path: str | Path) -> TrainingCheckpoint:
        """The checkpoint in a folder `step_...`, or the latest one of a run's folder or of its `checkpoints`.

        Raises CheckpointError when there is none, its index or a header is damaged, or a file is missing or cut short.
        """
        folder = _checkpoint_folder(Path(path))
        return cls(folder, read_index(folder))

    @property
    def names(self) -> list[str]:
        """Hugging Face's names, in the model's order; of tied weights the first one."""
        return list(self._weights)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._weights[name][0]

    def partition_dim(self, name: str) -> int | None:
        """The dimension that tensor-parallel ranks share; None where each holds the whole weight."""
        return self._weights[name][1]

    def dtype(self, name: str) -> torch.dtype:
        """What its master weights were saved in."""
        return self._first(name, "master").dtype

    def states(self, name: str) -> list[str]:
        """What `tensor` can give of a weight: 'master', and the optimizer's such as 'exp_avg' once it has any."""
        found = (what for what in self._pieces[name] if self._first(name, what).shape != ())
        return sorted(found, key=lambda what: (what != "master", what))

    def scalars(self, name: str) -> dict[str, float]:
        """What the optimizer counts for the weight, such as 'step'. Raises CheckpointError when a file is damaged."""
        counts = {}
        for what in self._pieces[name]:
            stored = self._first(name, what)
            if stored.shape == ():
                self._verify(stored.file.name)
                counts[what] = stored.read(0, 1).item()
        return counts

    def tensor(self, name: str, what: str = "master", dtype: torch.dtype | None = None) -> Tensor:
        """The whole weight, or one of its `states`, on the CPU; float32 as it was saved, or converted to `dtype`.

        Raises CheckpointError, naming file and weight, when a file is damaged, or pieces are missing or held twice.
        """
        shape, partition_dim = self._weights[name]
        by_rank = self._pieces[name].get(what, {})
        # Ranks that split nothing hold the same: the first one's is enough.
        ranks = range(1 if partition_dim is None else self._tp_size)
        shard = Span(shape, partition_dim, self._tp_size, 0, 0, 0).shard_shape
        complete = [self._complete(by_rank.get(rank, []), prod(shard), f"{what} of {name}", rank) for rank in ranks]
        whole = torch.empty(shape, dtype=dtype or torch.float32)  # not before it is known that the files hold as much
        target, copied = Span.whole(shape), 0
        for rank, pieces in enumerate(complete):
            for piece in pieces:
                self._verify(piece.stored.file.name)
                source = Span(shape, partition_dim, self._tp_size, rank, piece.start, piece.end - piece.start)
                copied += piece.stored.copy_overlap(source, target, whole.view(-1), BLOCK_ELEMENTS)
        assert copied == target.real_elements
        return whole

    def verify(self, on_read: Callable[[int], None] = lambda _: None) -> None:
        """Compare all files with their checksums; calls `on_read` with the bytes of each.

        Raises CheckpointError, naming the first one that is damaged.
        """
        for file, size in self.files.items():
            self._verify(file)
            on_read(size)

    def _find_pieces(self, file: str) -> None:
        path = self.folder / file
        name = _FILE_NAME.fullmatch(file)
        if name is None:
            raise CheckpointError(f"{path} is named in index.json, but not as a rank's file is")
        if not path.exists() or path.stat().st_size != self.files[file]:
            self._verify(file)
        try:
            for key, stored in stored_tensors(path).items():
                weight, start, what = key.split("|")
                if weight not in self._weights:
                    raise ValueError(f"{path} holds a piece of {weight}, of which index.json knows nothing")
                ranks = self._pieces[weight].setdefault(what, {})
                ranks.setdefault(int(name[1]), []).append(_Piece(int(start), stored))
        except ValueError as error:
            self._verify(file)  # a damaged file is one of ours, and says so
            raise CheckpointError(f"{path} is not a file of this checkpoint: {error}") from error

    def _complete(self, pieces: list[_Piece], elements: int, what: str, tp_rank: int) -> list[_Piece]:
        """The pieces in order, which are a whole shard."""
        pieces = sorted(pieces, key=lambda piece: piece.start)
        end, problem = 0, None
        for piece in pieces:
            if piece.start != end:
                held = "missing" if piece.start > end else "held twice"
                first, last = sorted((piece.start, end))
                problem = (
                    f"{piece.stored.file} begins at element {piece.start}: elements {first} to {last - 1} are {held}"
                )
                break
            end = piece.end
        if problem is None and end != elements:
            problem = f"its files hold {end:,} of {elements:,} elements"
        if problem is None:
            return pieces
        self.verify()
        raise CheckpointError(f"{self.folder}: {what}, tensor-parallel rank {tp_rank}: {problem}")

    def _verify(self, file: str) -> None:
        if file not in self._verified:
            verify_file(self.folder, file, self._index)
            self._verified.add(file)

    def _first(self, name: str, what: str) -> StoredTensor:
        return next(iter(self._pieces[name][what].values()))[0].stored


def _shape_and_split(shape: Any, partition_dim: Any) -> tuple[tuple[int, ...], int | None]:
    """What the index says of a weight. Raises ValueError when it is no shape, or no dimension of it."""
    if not isinstance(shape, list) or len(shape) not in (1, 2) or not all(isinstance(n, int) and n > 0 for n in shape):
        raise ValueError(f"shape={shape!r}")
    if partition_dim is not None and partition_dim not in range(len(shape)):
        raise ValueError(f"partition_dim={partition_dim!r} of shape={shape}")
    return tuple(shape), partition_dim


def _checkpoint_folder(path: Path) -> Path:
    if (path / "index.json").exists():
        return path
    for folder in (path, path / "checkpoints"):
        if (name := read_latest(folder)) is not None:
            return folder / name
    raise CheckpointError(
        f"{path} is no training checkpoint: neither a folder with an index.json, nor a run's folder with a latest one"
    )
