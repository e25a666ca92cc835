"""Folders that appear whole or not at all: written under a temporary name, synced, renamed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megazebra.checkpoint.store import CheckpointError
from megazebra.durable import partial_path, sync_folder


def check_absent(path: Path) -> None:
    """Raises CheckpointError when `path` exists: what is there may be all that somebody has."""
    if path.exists():
        raise CheckpointError(f"{path} exists; choose another folder, or remove it first")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path`; it becomes `path` when the block ends, and is removed when the block fails.

    Raises CheckpointError when `path` exists.
    """
    check_absent(path)
    temporary = partial_path(path)
    shutil.rmtree(temporary, ignore_errors=True)  # of an earlier attempt that was killed
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for file in temporary.iterdir():
            with file.open("rb+") as opened:
                os.fsync(opened.fileno())
        sync_folder(temporary)
        temporary.rename(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_folder(path.parent)
