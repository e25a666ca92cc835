"""Files that appear whole or not at all: written under a temporary name, synced, renamed. Imports no torch."""

from __future__ import annotations

import os
from pathlib import Path

PARTIAL_SUFFIX = ".partial"


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


def write_synced(path: str | Path, content: bytes) -> None:
    """Write `content` to `path` and wait until the disk has it."""
    try:
        with open(path, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:  # a full disk does not say which file
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


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
