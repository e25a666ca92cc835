"""From a training checkpoint of any layout to one whose files are what the ranks of another layout read.

A run resumes from any layout, but then its ranks search each other's files for what they need. Here every rank's files
are those it would write itself, so at the start it opens no others.
"""

from __future__ import annotations

import json
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from megazebra.checkpoint.fragments import MAX_FILE_BYTES
from megazebra.checkpoint.new_folder import check_absent, new_folder
from megazebra.checkpoint.reader import TrainingCheckpoint
from megazebra.checkpoint.regions import Span, copy_overlap
from megazebra.checkpoint.store import CheckpointError, Entry, read_index, write_index
from megazebra.checkpoint.tensor_file import BLOCK_ELEMENTS
from megazebra.checkpoint.zero_ranges import owned_ranges
from megazebra.config.checks import cross_problems
from megazebra.config.schema import ParallelConfig
from megazebra.durable import errors_name, write_atomically
from megazebra.train.deepspeed_config import effective_zero_stage

_STATE_BYTES = torch.float32.itemsize  # of masters, moments and counts: fp32 throughout


@dataclass(frozen=True)
class Reshard:
    """What is laid out anew: all of `checkpoint`, into the run folder `output`.

    tensor: tensor-parallel size. data: ranks that ZeRO shards over, data- times context-parallel size. zero_stage: of
    the run that is to read it; None: of the run that wrote it.
    Raises CheckpointError when the model has no such layout.
    """

    checkpoint: TrainingCheckpoint
    output: Path
    tensor: int
    data: int
    zero_stage: int | None = None

    def __post_init__(self) -> None:
        for name, size in (("tensor", self.tensor), ("data", self.data)):
            if size < 1:
                raise CheckpointError(f"{name}={size} must be at least one rank")
        sections = {"model": self.checkpoint.model, "parallel": ParallelConfig(tensor=self.tensor)}
        if problems := list(cross_problems(sections)):
            raise CheckpointError("; ".join(f"{key} {message}" for key, message in problems))

    @property
    def folder(self) -> Path:
        """Of the checkpoint in the run folder."""
        return self.output / "checkpoints" / f"step_{self.checkpoint.progress['step']:08d}"

    @property
    def layout(self) -> dict[str, int]:
        """As the index has it. How `data` is made up of data- and context-parallel ranks makes no difference."""
        return {"data": self.data, "context": 1, "tensor": self.tensor, "zero_stage": self._stage}

    def total_bytes(self) -> int:
        """Size of all weights and moments that are written."""
        return sum(
            span.count * _STATE_BYTES * len(self.checkpoint.states(name))
            for name, spans in self._spans.items()
            for _, _, span in spans
        )

    def write(self, max_file_bytes: int = MAX_FILE_BYTES, on_written: Callable[[int], None] = lambda _: None) -> None:
        """Write the checkpoint, one whole tensor in memory at a time, and let `latest` point to it.

        Calls `on_written` with the bytes of each piece. The folder appears complete or not at all. Raises
        CheckpointError when the checkpoint is damaged or the run folder has one, OSError naming the file when one
        cannot be written.
        """
        self.check_absent()
        index = read_index(self.checkpoint.folder)
        with new_folder(self.folder) as folder:
            files = self._begin_files(folder, max_file_bytes)
            for name, spans in self._spans.items():
                for state in self.checkpoint.states(name):
                    whole = self.checkpoint.tensor(name, state)
                    for tp_rank, dp_rank, span in spans:
                        file = files[tp_rank, dp_rank, name]
                        for block in _blocks_of(span, whole):
                            file.append(block)
                        on_written(span.count * _STATE_BYTES)
                    del whole  # before the next one is read
                for value in self.checkpoint.scalars(name).values():
                    for tp_rank, dp_rank, _ in spans:
                        files[tp_rank, dp_rank, name].append(torch.tensor(value))
            entries = {file.path.name: file.entry() for file in dict.fromkeys(files.values())}
            write_index(folder, {**index, "layout": self.layout, "files": entries})
        write_atomically(self._latest, f"{self.folder.name}\n".encode())

    def check_absent(self) -> None:
        """Raises CheckpointError when the run folder has a checkpoint."""
        for path in (self.folder, self._latest):
            check_absent(path)

    @property
    def _latest(self) -> Path:
        return self.folder.with_name("latest")

    @property
    def _stage(self) -> int:
        config = self.checkpoint.config
        stage = self.checkpoint.layout["zero_stage"] if self.zero_stage is None else self.zero_stage
        parallel = config.parallel.model_copy(update={"zero_stage": stage})
        return effective_zero_stage(config.model_copy(update={"parallel": parallel}))

    @cached_property
    def _spans(self) -> dict[str, list[tuple[int, int, Span]]]:
        """For every weight who holds what of it: tensor- and data-parallel rank, and which elements."""
        splits = {
            name: (self.checkpoint.shape(name), self.checkpoint.partition_dim(name)) for name in self.checkpoint.names
        }
        # Ranks of one tensor-parallel group differ in what they hold, the groups do not.
        shards = {name: Span(*split, self.tensor, 0, 0, 0).shard_shape for name, split in splits.items()}
        spans: dict[str, list[tuple[int, int, Span]]] = {name: [] for name in self.checkpoint.names}
        for dp_rank in range(self.data):
            for owned in owned_ranges(shards, self._stage, self.data, dp_rank):
                for tp_rank in range(self.tensor):
                    span = Span(*splits[owned.name], self.tensor, tp_rank, owned.start, owned.count)
                    spans[owned.name].append((tp_rank, dp_rank, span))
        return spans

    def _begin_files(self, folder: Path, max_file_bytes: int) -> dict[tuple[int, int, str], _PieceFile]:
        """The file of every rank's piece of every weight, each with its header."""
        of_rank: dict[tuple[int, int], list[_PieceFile]] = defaultdict(list)
        file_of: dict[tuple[int, int, str], _PieceFile] = {}
        for name, spans in self._spans.items():
            scalars = list(self.checkpoint.scalars(name))
            for tp_rank, dp_rank, span in spans:
                shapes: dict[str, tuple[int, ...]] = dict.fromkeys(self.checkpoint.states(name), (span.count,))
                shapes |= dict.fromkeys(scalars, ())
                files = of_rank[tp_rank, dp_rank]
                size = sum(prod(shape) * _STATE_BYTES for shape in shapes.values())
                if not files or (files[-1].data_bytes and files[-1].data_bytes + size > max_file_bytes):
                    number = len(files)
                    path = folder / f"tp_{tp_rank:03d}_dp_{dp_rank:03d}_{number:02d}.safetensors"
                    files.append(_PieceFile(path, tp_rank))
                files[-1].announce(name, span, shapes)
                file_of[tp_rank, dp_rank, name] = files[-1]
        for files in of_rank.values():
            for file in files:
                file.write_header()
        return file_of


@dataclass(eq=False)
class _PieceFile:
    """A safetensors file that is written in order, opened for every block: there may be more ranks than open files."""

    path: Path
    tensor_rank: int
    data_bytes: int = 0
    _header: dict[str, object] = field(default_factory=dict)
    _pieces: dict[str, list[int]] = field(default_factory=dict)
    _crc: int = 0

    def announce(self, name: str, span: Span, shapes: dict[str, tuple[int, ...]]) -> None:
        """What will be written next, in this order."""
        for what, shape in shapes.items():
            end = self.data_bytes + prod(shape) * _STATE_BYTES
            entry = {"dtype": "F32", "shape": shape, "data_offsets": [self.data_bytes, end]}
            self._header[f"{name}|{span.start}|{what}"] = entry
            self.data_bytes = end
        self._pieces[name] = [span.start, span.count]

    def write_header(self) -> None:
        header = json.dumps(self._header).encode()
        header = header.ljust(-(-len(header) // 8) * 8)
        self._write(len(header).to_bytes(8, "little") + header)

    def append(self, values: Tensor) -> None:
        self._write(values.to(torch.float32).reshape(-1).numpy().data)

    def entry(self) -> Entry:
        """What the index holds of the file."""
        size = self.path.stat().st_size
        return {"bytes": size, "crc32": self._crc, "tensor_rank": self.tensor_rank, "pieces": self._pieces}

    def _write(self, content: bytes | memoryview) -> None:
        self._crc = zlib.crc32(content, self._crc)
        with errors_name(self.path), self.path.open("ab") as file:
            file.write(content)


def _blocks_of(span: Span, whole: Tensor) -> Iterator[Tensor]:
    """The elements of a span in order, a block at a time; its padding is zero."""
    source = Span.whole(span.shape)
    for start in range(span.start, span.start + span.count, BLOCK_ELEMENTS):
        count = min(BLOCK_ELEMENTS, span.start + span.count - start)
        block = Span(span.shape, span.partition_dim, span.tp_size, span.tp_rank, start, count)
        values = torch.zeros(count)
        copy_overlap(source, whole.view(-1), block, values)
        yield values
