"""Inputs cut into tasks: pieces of about equal size that are read and encoded independently of each other."""

from __future__ import annotations

import itertools
import os.path
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from megazebra.data.prepare.inputs.files import PARQUET_SUFFIX, InputFile, content_hash, held_out, name_bytes
from megazebra.data.prepare.inputs.parquet import columns_to_read, open_parquet, row_group_bytes


@dataclass(frozen=True)
class TextDocument:
    """Files of text that together become one document. name: of the file, or of the folder they lie in."""

    name: str
    files: tuple[InputFile, ...]
    validation: bool

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files)


@dataclass(frozen=True)
class TextTask:
    documents: tuple[TextDocument, ...]

    @property
    def bytes(self) -> int:
        return sum(document.bytes for document in self.documents)


@dataclass(frozen=True)
class JsonLinesTask:
    """The lines that begin in bytes [start, stop) of the file; a compressed file is one task."""

    file: InputFile
    start: int
    stop: int

    @property
    def bytes(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class ParquetTask:
    """Some row groups of a file. first_row: rows before them. bytes: of the columns to read, uncompressed."""

    file: InputFile
    columns: tuple[str, ...]
    row_groups: range
    first_row: int
    rows: int
    bytes: int


Task = TextTask | JsonLinesTask | ParquetTask
Thing = TypeVar("Thing")


def text_documents(
    files: Iterable[InputFile], documents: Literal["file", "directory"], validation_share: float
) -> list[TextDocument]:
    """One document per file, or per folder with its files in the order of their names; sorted by name.

    A document's side depends on its name alone, so it keeps it as others come and go.
    """
    name_of = _folder if documents == "directory" else _name
    groups = itertools.groupby(sorted(files, key=lambda file: (name_of(file), file)), key=name_of)
    return [
        TextDocument(name, tuple(members), held_out(name_bytes(name), validation_share)) for name, members in groups
    ]


def with_nearest_held_out(documents: Sequence[TextDocument]) -> list[TextDocument]:
    """The documents, the one nearest to the validation share held out where the share falls on none of them."""
    if len(documents) < 2 or any(document.validation for document in documents):
        return list(documents)
    nearest = min(documents, key=lambda document: content_hash(name_bytes(document.name)))
    return [TextDocument(document.name, document.files, validation=document is nearest) for document in documents]


def plan_tasks(
    documents: Iterable[TextDocument],
    record_files: Iterable[InputFile],
    columns: tuple[str, ...],
    task_bytes: int,
) -> list[Task]:
    """Everything there is to encode, in the order of the names; the plan depends on nothing but the arguments.

    columns: to read of .parquet files, as far as they have them; () for all. task_bytes: of a task, roughly; row
    groups and compressed files are not cut.

    Raises CorpusError for a .parquet file that cannot be read or has none of the columns.
    """
    sources: list[TextDocument | InputFile] = sorted([*documents, *record_files], key=lambda source: source.name)
    tasks: list[Task] = []
    for is_text, run in itertools.groupby(sources, key=lambda source: isinstance(source, TextDocument)):
        if is_text:
            texts = (source for source in run if isinstance(source, TextDocument))
            groups = gathered(texts, lambda document: document.bytes, task_bytes)
            tasks += [TextTask(tuple(group)) for group in groups]
            continue
        for file in run:
            assert isinstance(file, InputFile)
            tasks += (
                _parquet_tasks(file, columns, task_bytes)
                if file.path.endswith(PARQUET_SUFFIX)
                else _json_lines_tasks(file, task_bytes)
            )
    return tasks


def _name(file: InputFile) -> str:
    return file.name


def _folder(file: InputFile) -> str:
    return os.path.dirname(file.name) or file.name


def gathered(things: Iterable[Thing], size_of: Callable[[Thing], int], least: int) -> Iterator[list[Thing]]:
    """The things in their order, in groups that end as soon as they have `least` in all."""
    group: list[Thing] = []
    size = 0
    for thing in things:
        group.append(thing)
        size += size_of(thing)
        if size >= least:
            yield group
            group, size = [], 0
    if group:
        yield group


def _json_lines_tasks(file: InputFile, task_bytes: int) -> list[JsonLinesTask]:
    step = max(file.bytes, 1) if file.is_compressed else task_bytes
    return [JsonLinesTask(file, start, min(start + step, file.bytes)) for start in range(0, file.bytes, step)]


def _parquet_tasks(file: InputFile, columns: tuple[str, ...], task_bytes: int) -> list[ParquetTask]:
    tasks: list[ParquetTask] = []
    with open_parquet(file) as parquet:
        columns = columns_to_read(parquet, file, columns)
        sizes = row_group_bytes(parquet, columns)
        rows = [parquet.metadata.row_group(group).num_rows for group in range(len(sizes))]
    first_group = first_row = 0
    while first_group < len(sizes):
        stop, size = first_group, 0
        while stop < len(sizes) and (size == 0 or size + sizes[stop] <= task_bytes):
            size += sizes[stop]
            stop += 1
        count = sum(rows[first_group:stop])
        tasks.append(ParquetTask(file, columns, range(first_group, stop), first_row, count, size))
        first_group, first_row = stop, first_row + count
    return tasks
