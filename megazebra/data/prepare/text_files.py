"""Folders of text as named documents, in an order and under names that don't depend on the machine."""

from __future__ import annotations

import fnmatch
import hashlib
import os
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megazebra.data.errors import CorpusError

STDLIB = "stdlib"
SKIPPED_FOLDERS = {"__pycache__", "site-packages", "dist-packages"}


@dataclass(frozen=True, order=True)
class TextFile:
    """A file to become a document. name: input label and path inside the input, with forward slashes."""

    name: str
    path: str
    bytes: int
    mtime_ns: int


def gather_text_files(
    inputs: Sequence[str], globs: Sequence[str] = (), *, exclude: str | Path | None = None
) -> list[TextFile]:
    """The files of all inputs, sorted by name.

    inputs: folders, or the word `stdlib` for the running Python's standard library. globs: patterns a file name
    has to match one of; by default *.py in the standard library and every file elsewhere. Hidden files and
    folders are left out, as are installed packages, bytecode, links to folders, and the folder `exclude`.

    Raises CorpusError for a missing folder or one without such files.
    """
    excluded = os.path.realpath(exclude) if exclude is not None else None
    files: list[TextFile] = []
    labels: set[str] = set()
    for given in inputs:
        folder = Path(sysconfig.get_path("stdlib")) if given == STDLIB else Path(given)
        patterns = tuple(globs) or (("*.py",) if given == STDLIB else ("*",))
        if not folder.is_dir():
            problem = "is not a folder" if folder.exists() else "does not exist"
            raise CorpusError(f"--input {given}: {folder} {problem}; give a folder of text files, or {STDLIB}")
        if os.path.realpath(folder) == excluded:
            raise CorpusError(f"--input {given} is the output folder too; give another --output")
        label = _unused_label(STDLIB if given == STDLIB else folder.resolve().name or "root", labels)
        found = [
            _text_file(f"{label}/{path.relative_to(folder).as_posix()}", path)
            for path in _walk(folder, excluded)
            if any(fnmatch.fnmatchcase(path.name, pattern) for pattern in patterns)
        ]
        if not found:
            raise CorpusError(f"--input {given}: {folder} has no file like {', '.join(patterns)}; give another --glob")
        files += found
    return sorted(files)


def read_text(file: TextFile) -> str:
    """The file's text as it is, line ends included. Raises UnicodeDecodeError where it is not UTF-8."""
    return Path(file.path).read_bytes().decode("utf-8")


def split_files(files: Iterable[TextFile], validation_share: float) -> tuple[list[TextFile], list[TextFile]]:
    """Training and validation files, each in the order given.

    A file's side depends on its name alone, so it keeps it as files come and go. Where a positive share falls on
    no file at all, the file nearest to it becomes the validation set.
    """
    train: list[TextFile] = []
    validation: list[TextFile] = []
    for file in files:
        (validation if name_hash(file) < validation_share * 2**64 else train).append(file)
    if validation_share > 0 and not validation and len(train) > 1:
        nearest = min(train, key=name_hash)
        train.remove(nearest)
        validation.append(nearest)
    return train, validation


def name_hash(file: TextFile) -> int:
    """64 bits that depend on the name only."""
    return int.from_bytes(hashlib.sha256(file.name.encode("utf-8", "surrogateescape")).digest()[:8], "little")


def manifest_fingerprint(files: Iterable[TextFile]) -> str:
    """sha256 over names, sizes and modification times: equal when no file was touched."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name}\0{file.bytes}\0{file.mtime_ns}\n".encode("utf-8", "surrogateescape"))
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


def _text_file(name: str, path: Path) -> TextFile:
    status = path.stat()
    return TextFile(name, str(path), status.st_size, status.st_mtime_ns)


def _unused_label(label: str, labels: set[str]) -> str:
    """Two inputs may be called alike: src, src-2, ..."""
    unused, number = label, 1
    while unused in labels:
        number += 1
        unused = f"{label}-{number}"
    labels.add(unused)
    return unused
