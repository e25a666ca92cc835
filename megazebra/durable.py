"""Files that appear whole or not at all: written under a temporary name, synced, renamed. Imports no torch."""

from __future__ import annotations

import contextlib
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

PARTIAL_SUFFIX = ".partial"
_CHUNK_BYTES = 1 << 24


def partial_path(path: str | Path) -> Path:
    """Where `path` grows before it is published; the same folder, so that the rename is atomic."""
    return Path(f"{path}{PARTIAL_SUFFIX}")


def sync_folder(folder: str | Path) -> None:
    """Make the folder's renames and removals survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_file_name(name: object) -> bool:
    """Whether a name, which another file may give, is that of a file in the folder it is looked for in: no path."""
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & {"/", "\\", "\0"}


@contextlib.contextmanager
def errors_name(path: str | Path) -> Iterator[None]:
    """Reading and writing inside raise OSErrors that name the file: a full or broken disk does not say which one."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def sync_file(path: str | Path) -> None:
    """Wait until the disk has what was written to the file."""
    with errors_name(path), open(path, "rb+") as file:
        os.fsync(file.fileno())


def write_synced(path: str | Path, content: bytes) -> None:
    """Write `content` to `path` and wait until the disk has it."""
    with errors_name(path), open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def file_crc32(path: str | Path) -> int:
    """CRC-32 of a whole file, read in pieces."""
    crc = 0
    with errors_name(path), open(path, "rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            crc = zlib.crc32(chunk, crc)
    return crc


def write_atomically(path: str | Path, content: bytes) -> None:
    """Replace `path` by `content` in one step: a reader sees the old file or the new one."""
    partial = partial_path(path)
    try:
        write_synced(partial, content)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync_folder(Path(path).parent)


@contextlib.contextmanager
def text_file(path: Path) -> Iterator[TextIO]:
    """A file to write text to, which appears as `path` when the block ends, and not at all after an error in it.

    Makes the folder where there is none.
    """
    partial = partial_path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with errors_name(partial), open(partial, "w", encoding="utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)
