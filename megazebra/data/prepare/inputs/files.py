"""What there is to read: files of text and of records, in an order and under names that don't depend on the machine."""

from __future__ import annotations

import contextlib
import fnmatch
import hashlib
import os
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from megazebra.data.errors import CorpusError

STDLIB = "stdlib"
SKIPPED_FOLDERS = {"__pycache__", "site-packages", "dist-packages"}
COMPRESSED_SUFFIXES = (".gz", ".zst")
JSON_LINES_SUFFIXES = (
    *(".jsonl", ".ndjson"),
    *(name + packed for name in (".jsonl", ".ndjson", ".json") for packed in COMPRESSED_SUFFIXES),
)
PARQUET_SUFFIX = ".parquet"


@dataclass(frozen=True, order=True)
class InputFile:
    """A file to read. name: input label and path inside the input, with forward slashes."""

    name: str
    path: str
    bytes: int
    mtime_ns: int

    @property
    def holds_records(self) -> bool:
        """Whether it holds many records, one document each, rather than one text."""
        return self.path.endswith((*JSON_LINES_SUFFIXES, PARQUET_SUFFIX))

    @property
    def is_compressed(self) -> bool:
        return self.path.endswith(COMPRESSED_SUFFIXES)

    @contextlib.contextmanager
    def open(self) -> Iterator[BinaryIO]:
        """Raises CorpusError, before and after, where the file is no longer the one that was gathered."""
        with open(self.path, "rb", buffering=2**20) as file:
            self._check_unchanged(file)
            yield file
            self._check_unchanged(file)

    def _check_unchanged(self, file: BinaryIO) -> None:
        status = os.fstat(file.fileno())
        if (status.st_size, status.st_mtime_ns) != (self.bytes, self.mtime_ns):
            raise CorpusError(f"{self.path} has changed since the build began; start it again")


def gather_files(
    inputs: Sequence[str], globs: Sequence[str] = (), *, exclude: str | Path | None = None
) -> list[InputFile]:
    """The files of all inputs, sorted by name.

    inputs: folders, files, or the word `stdlib` for the running Python's standard library. globs: patterns a file
    name in a folder has to match one of; by default *.py in the standard library and every file elsewhere. Hidden
    files and folders are left out, as are installed packages, bytecode, links to folders, and the folder `exclude`.

    Raises CorpusError for a missing input or a folder without such files.
    """
    excluded = os.path.realpath(exclude) if exclude is not None else None
    files: list[InputFile] = []
    labels: set[str] = set()
    for given in inputs:
        source = Path(sysconfig.get_path("stdlib")) if given == STDLIB else Path(given)
        patterns = tuple(globs) or (("*.py",) if given == STDLIB else ("*",))
        if not source.exists():
            raise CorpusError(f"--input {given}: {source} does not exist; give a folder, a file, or {STDLIB}")
        if os.path.realpath(source) == excluded:
            raise CorpusError(f"--input {given} is the output folder too; give another --output")
        # Not resolved: a link is called what its user calls it.
        label = _unused_label(STDLIB if given == STDLIB else Path(os.path.abspath(source)).name or "root", labels)
        if source.is_file():
            files.append(_input_file(label, source))
            continue
        found = [
            _input_file(f"{label}/{path.relative_to(source).as_posix()}", path)
            for path in _walk(source, excluded)
            if any(fnmatch.fnmatchcase(path.name, pattern) for pattern in patterns)
        ]
        if not found:
            raise CorpusError(f"--input {given}: {source} has no file like {', '.join(patterns)}; give another --glob")
        files += found
    return sorted(files)


def content_hash(content: bytes) -> int:
    """64 bits that depend on `content` only."""
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "little")


def held_out(content: bytes, validation_share: float) -> bool:
    """Whether a document belongs to the validation set: what decides is a hash, so its side stays as others come."""
    return content_hash(content) < validation_share * 2**64


def name_bytes(name: str) -> bytes:
    """A name of the file system as bytes, also where it is not UTF-8."""
    return name.encode("utf-8", "surrogateescape")


def manifest_fingerprint(files: Iterable[InputFile]) -> str:
    """sha256 over names, sizes and modification times: equal when no file was touched."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(name_bytes(f"{file.name}\0{file.bytes}\0{file.mtime_ns}\n"))
    return digest.hexdigest()


def _walk(folder: Path, excluded: str | None) -> Iterable[Path]:
    for parent, folders, names in os.walk(folder, onerror=_raise):
        folders[:] = [
            name
            for name in folders
            if not name.startswith(".")
            and name not in SKIPPED_FOLDERS
            and os.path.realpath(os.path.join(parent, name)) != excluded
        ]
        yield from (Path(parent, name) for name in names if not name.startswith(".") and Path(parent, name).is_file())


def _raise(error: OSError) -> None:
    raise error


def _input_file(name: str, path: Path) -> InputFile:
    status = path.stat()
    return InputFile(name, str(path), status.st_size, status.st_mtime_ns)


def _unused_label(label: str, labels: set[str]) -> str:
    """Two inputs may be called alike: src, src-2, ..."""
    unused, number = label, 1
    while unused in labels:
        number += 1
        unused = f"{label}-{number}"
    labels.add(unused)
    return unused
