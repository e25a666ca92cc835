"""Checkpoint folders: complete or not there.

    checkpoints/
      step_00000200/
        index.json                    what is in it: format, layout, config, a size and CRC-32 per file
        tp_000_dp_000.safetensors     what that rank owns (see fragments.py)
      latest                          name of the newest complete folder

A folder is written under a temporary name, every file flushed to disk, then renamed, and only then does
`latest` point to it. All ranks must see the folder (a shared file system).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megazebra.durable import file_crc32, partial_path, sync_folder, write_atomically
from megazebra.errors import UserError
from megazebra.parallel.collectives import gather_objects
from megazebra.parallel.mesh import Group

FORMAT_VERSION = 2


class CheckpointError(UserError):
    """A checkpoint that cannot be written, read, or used for this run."""


class CheckpointStore:
    """The checkpoints of one run. Every rank of `world` makes the same calls; an error on one is raised on all."""

    def __init__(self, folder: Path, world: Group, keep_last: int) -> None:
        self.folder = folder
        self.world = world
        self.keep_last = keep_last

    def latest(self) -> Path | None:
        """Folder of the newest complete checkpoint; None where there is none.

        Raises CheckpointError on all ranks when they do not see the same.
        """

        def read() -> str | None:
            pointer = self.folder / "latest"
            return pointer.read_text().strip() if pointer.exists() else None

        names = self._together(f"cannot read {self.folder}/latest", read)
        if len(set(names)) > 1:
            raise CheckpointError(
                f"ranks see different checkpoints in {self.folder} ({', '.join(sorted(map(str, set(names))))}); "
                "run.dir must lie on a file system that all nodes share"
            )
        return None if names[0] is None else self.folder / names[0]

    def save(self, step: int, write_files: Callable[[Path], list[Path]], index: dict[str, Any]) -> Path:
        """Write the checkpoint of `step`; `write_files(folder)` writes this rank's files and names them.

        Raises CheckpointError on every rank when any rank failed; nothing half-written is left.
        """
        final = self.folder / f"step_{step:08d}"
        temporary = partial_path(final)

        def prepare() -> None:
            if self.world.rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(parents=True)

        def write() -> dict[str, dict[str, int]]:
            return {path.name: _describe(path) for path in write_files(temporary)}

        try:
            self._together(f"cannot create {temporary}", prepare)
            files = self._together(f"cannot write {final}", write)
            self._together(f"cannot finish {final}", lambda: self._publish(temporary, final, index, files))
        except CheckpointError:
            if self.world.rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)
            raise
        return final

    def _publish(self, temporary: Path, final: Path, index: dict[str, Any], files: list[dict[str, Any]]) -> None:
        if self.world.rank != 0:
            return
        merged = {name: entry for part in files for name, entry in part.items()}
        content = json.dumps({"format": FORMAT_VERSION, **index, "files": merged}, indent=1)
        write_atomically(temporary / "index.json", content.encode())
        if final.exists():  # an earlier attempt at the same step, of a run that then went back
            shutil.rmtree(final)
        os.replace(temporary, final)
        sync_folder(self.folder)
        write_atomically(self.folder / "latest", f"{final.name}\n".encode())
        # Later steps than this one belong to a future the user has gone back from: not ours to delete.
        past = sorted(path for path in self.folder.glob("step_????????") if path.name <= final.name)
        for old in past[: -self.keep_last]:
            shutil.rmtree(old, ignore_errors=True)

    def load(self, folder: Path, read_files: Callable[[Path, dict[str, Any]], None]) -> dict[str, Any]:
        """Call `read_files(folder, index)` on every rank and return the index.

        Raises CheckpointError on every rank when any rank's part is damaged or does not fit.
        """

        index: dict[str, Any] = {}

        def read() -> None:
            index.update(read_index(folder))  # every rank has read it: only the outcome needs to travel
            read_files(folder, index)

        self._together(f"cannot resume from {folder}", read)
        return index

    def _together(self, what: str, action: Callable[[], Any]) -> list[Any]:
        """Every rank's result of `action`, or the first rank's error on all ranks."""
        result, error = None, None
        try:
            result = action()
        except Exception as problem:  # whatever it is, the other ranks must not wait for this one
            error = str(problem) if isinstance(problem, CheckpointError) else f"{type(problem).__name__}: {problem}"
        outcomes = gather_objects((result, error), self.world)
        errors = [f"rank {rank}: {text}" for rank, (_, text) in enumerate(outcomes) if text is not None]
        if errors:
            more = f" (and {len(errors) - 1} more ranks)" if len(errors) > 1 else ""
            raise CheckpointError(f"{what}: {errors[0]}{more}")
        return [value for value, _ in outcomes]


def read_index(folder: Path) -> dict[str, Any]:
    """The index of a checkpoint folder. Raises CheckpointError when it is missing, damaged or of another format."""
    path = folder / "index.json"
    try:
        index = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is missing or damaged ({error}); point `latest` to an older folder") from error
    if index.get("format") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format {index.get('format')!r}, this version reads {FORMAT_VERSION}; "
            "go on with the version that wrote it, or choose another run.dir"
        )
    return index


def verify_file(folder: Path, name: str, index: dict[str, Any]) -> Path:
    """Path of the file, which is whole. Raises CheckpointError when it is missing, cut short or changed."""
    path = folder / name
    entry = index["files"].get(name)
    if entry is None or not path.exists():
        raise CheckpointError(f"{path} is missing; point `latest` to an older folder")
    size = path.stat().st_size
    if size != entry["bytes"]:
        raise CheckpointError(
            f"{path} has {size} bytes, {entry['bytes']} were written; point `latest` to an older folder"
        )
    if file_crc32(path) != entry["crc32"]:
        raise CheckpointError(f"{path} is damaged (its CRC-32 differs); point `latest` to an older folder")
    return path


def _describe(path: Path) -> dict[str, int]:
    with path.open("rb+") as file:
        os.fsync(file.fileno())
    return {"bytes": path.stat().st_size, "crc32": file_crc32(path)}
