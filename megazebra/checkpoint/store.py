"""Checkpoint folders: complete or not there.

    checkpoints/
      step_00000200/
        index.json                       what is in it: format, layout, config; for every file its size, its CRC-32
                                         and the pieces of weights in it
        tp_000_dp_000_00.safetensors     what that rank owns (see fragments.py)
      latest                             name of the newest complete folder

A folder is written under a temporary name, every file flushed to disk, then renamed, and only then does
`latest` point to it. All ranks must see the folder (a shared file system). Writing may go on beside training: see
`Saving`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megazebra.durable import (
    PARTIAL_SUFFIX,
    file_crc32,
    is_file_name,
    partial_path,
    sync_folder,
    write_atomically,
)
from megazebra.errors import PassingError, UserError, passes
from megazebra.parallel.collectives import all_reduce, gather_objects
from megazebra.parallel.mesh import Group

FORMAT_VERSION = 3

GO_BACK = "copy it anew, or take an older checkpoint, as a run does by itself with checkpoint.on_damage=go_back"
_POINT = "write the name of the newest step_... folder into it"
_FOLDER_NAME = re.compile(r"step_\d{8,}")
Entry = dict[str, Any]  # of a file in the index: its size in `bytes`, its `crc32`, and what the writer knows beside
WriteFiles = Callable[[Path], dict[Path, Entry]]


class CheckpointError(UserError):
    """A checkpoint that cannot be written, read, or used for this run."""


class DamagedCheckpointError(CheckpointError):
    """A checkpoint that is no longer what was written."""


class Saving:
    """A checkpoint whose files a thread of this rank is writing. Every rank has one, and gives it to `finish`."""

    def __init__(self, step: int, folder: Path, index: dict[str, Any], write_files: WriteFiles) -> None:
        self.step, self.folder, self.index = step, folder, index
        self.files: dict[str, Entry] = {}
        self.bytes = 0  # of all ranks, once finished
        self.started, self.seconds = time.perf_counter(), 0.0
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._write, args=(write_files,), name="checkpoint", daemon=True)
        self._thread.start()

    def _write(self, write_files: WriteFiles) -> None:
        try:
            entries = write_files(partial_path(self.folder))
            self.files = {path.name: entry for path, entry in entries.items()}
        except Exception as error:  # raised by `outcome`, where all ranks hear of it
            self._error = error

    @property
    def written(self) -> bool:
        return not self._thread.is_alive()

    def outcome(self) -> dict[str, Entry]:
        """Waits for the thread. Raises what stopped it."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self.files


class CheckpointStore:
    """The checkpoints of one run. Every rank of `world` makes the same calls; an error on one is raised on all.

    device: where tensors must be to travel over `world`; None: on the CPU.
    """

    def __init__(
        self,
        folder: Path,
        world: Group,
        keep_last: int,
        keep_every: int = 0,
        device: torch.device | None = None,
    ) -> None:
        self.folder = folder
        self.world = world
        self.keep_last = keep_last
        self.keep_every = keep_every
        self.device = device

    def latest(self) -> Path | None:
        """Folder of the newest complete checkpoint; None where there is none.

        Raises CheckpointError on all ranks when they do not see the same.
        """

        names = self._together(f"cannot read {self.folder}/latest", lambda: read_latest(self.folder))
        if len(set(names)) > 1:
            raise CheckpointError(
                f"ranks see different checkpoints in {self.folder} ({', '.join(sorted(map(str, set(names))))}); "
                "run.dir must lie on a file system that all nodes share"
            )
        return None if names[0] is None else self.folder / names[0]

    def complete(self) -> list[str]:
        """Names of the folders that are whole, newest first (to be called on one rank: others may see them later)."""
        return sorted((path.name for path in self.folder.glob("step_????????")), reverse=True)

    def save(self, step: int, write_files: WriteFiles, index: dict[str, Any]) -> Saving:
        """Write the checkpoint of `step` and wait for it. Raises as `begin` and `finish` do."""
        return self.finish(self.begin(step, write_files, index))

    def begin(self, step: int, write_files: WriteFiles, index: dict[str, Any]) -> Saving:
        """Start to write: `write_files(folder)`, in a thread, writes this rank's files, waits until the disk has them
        and says what the index holds of each. One saving at a time.

        Raises CheckpointError on every rank when the folder can't be made.
        """
        final = self.folder / f"step_{step:08d}"

        def prepare() -> None:
            if self.world.rank == 0:
                for leftover in self.folder.glob(f"*{PARTIAL_SUFFIX}"):  # of a run that was killed
                    shutil.rmtree(leftover, ignore_errors=True)
                partial_path(final).mkdir(parents=True)

        self._together(f"cannot create {partial_path(final)}", prepare)
        return Saving(step, final, index, write_files)

    def all_written(self, saving: Saving) -> bool:
        """Whether `finish` would not wait for any rank."""
        writing = torch.tensor([float(not saving.written)], device=self.device)
        return not all_reduce(writing, self.world, maximum=True, label="checkpoint").item()

    def finish(self, saving: Saving) -> Saving:
        """Wait until every rank has written its files, then publish the folder.

        Raises CheckpointError on every rank when any rank failed; nothing half-written is left.
        """
        temporary = partial_path(saving.folder)
        try:
            files = self._together(f"cannot write {saving.folder}", saving.outcome)
            merged = {name: entry for part in files for name, entry in part.items()}
            self._together(f"cannot finish {saving.folder}", lambda: self._publish(saving, merged))
        except (CheckpointError, PassingError):
            if self.world.rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)
            raise
        saving.bytes = sum(entry["bytes"] for entry in merged.values())
        saving.seconds = time.perf_counter() - saving.started
        return saving

    def _publish(self, saving: Saving, files: dict[str, Entry]) -> None:
        if self.world.rank != 0:
            return
        temporary, final = partial_path(saving.folder), saving.folder
        write_index(temporary, {"format": FORMAT_VERSION, **saving.index, "files": files})
        if final.exists():  # an earlier attempt at the same step, of a run that then went back
            shutil.rmtree(final)
        os.replace(temporary, final)
        sync_folder(self.folder)
        write_atomically(self.folder / "latest", f"{final.name}\n".encode())
        # Later steps than this one belong to a future the user has gone back from: not ours to delete.
        past = [name for name in self.complete() if name <= final.name]
        for old in past[self.keep_last :]:
            if not self.keep_every or int(old.removeprefix("step_")) % self.keep_every:
                shutil.rmtree(self.folder / old, ignore_errors=True)

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

    def older_than(self, folder: Path) -> Path | None:
        """The newest folder before this one; None where there is none. Every rank calls it and gets the same."""
        older = self._together("cannot list checkpoints", lambda: [n for n in self.complete() if n < folder.name])[0]
        return self.folder / older[0] if older else None

    def point_to(self, folder: Path) -> None:
        """Make an older checkpoint the one to go on with. Raises CheckpointError on every rank."""

        def write() -> None:
            if self.world.rank == 0:
                write_atomically(self.folder / "latest", f"{folder.name}\n".encode())

        self._together(f"cannot write {self.folder}/latest", write)

    def _together(self, what: str, action: Callable[[], Any]) -> list[Any]:
        """Every rank's result of `action`, or the first rank's error on all ranks.

        Raises DamagedCheckpointError if that is any rank's, PassingError if the cause is any rank's of that kind, else
        CheckpointError.
        """
        result, error, kind = None, None, None
        try:
            result = action()
        except Exception as problem:  # whatever it is, the other ranks must not wait for this one
            error = str(problem) if isinstance(problem, CheckpointError) else f"{type(problem).__name__}: {problem}"
            kind = _kind_of(problem)
        outcomes = gather_objects((result, error, kind), self.world)
        errors = [f"rank {rank}: {text}" for rank, (_, text, _) in enumerate(outcomes) if text is not None]
        if errors:
            more = f" (and {len(errors) - 1} more ranks)" if len(errors) > 1 else ""
            kinds = [kind for *_, kind in outcomes]
            raise next(kind for kind in _KINDS if kind in kinds)(f"{what}: {errors[0]}{more}")
        return [value for value, *_ in outcomes]


# Of several ranks' errors the first of these is raised on all.
_KINDS: tuple[type[Exception], ...] = (DamagedCheckpointError, PassingError, CheckpointError)


def _kind_of(error: Exception) -> type[Exception]:
    if isinstance(error, DamagedCheckpointError):
        return DamagedCheckpointError
    return PassingError if passes(error) else CheckpointError


def read_latest(folder: Path) -> str | None:
    """Name of the newest complete checkpoint in a run's `checkpoints`; None where there is none.

    Raises CheckpointError when the file `latest` holds no such name.
    """
    path = folder / "latest"
    try:
        name = path.read_text().strip()
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); {_POINT}") from error
    if not _FOLDER_NAME.fullmatch(name):
        raise CheckpointError(f"{path} says {name[:80]!r}, which is no checkpoint; {_POINT}")
    return name


def write_index(folder: Path, index: dict[str, Any]) -> None:
    """Write what `read_index` reads, with a CRC-32 of its own."""
    write_atomically(folder / "index.json", json.dumps({**index, "crc32": _crc32(index)}, indent=1).encode())


def read_index(folder: Path) -> dict[str, Any]:
    """The index of a checkpoint folder. Raises CheckpointError when it is missing, damaged or of another format."""
    path = folder / "index.json"
    try:
        index = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedCheckpointError(f"{path} is missing or damaged ({error}); {GO_BACK}") from error
    changed = (
        isinstance(index, dict) and index.get("format") == FORMAT_VERSION and index.pop("crc32", 0) != _crc32(index)
    )
    if changed or not isinstance(index, dict):
        raise DamagedCheckpointError(f"{path} is damaged (its CRC-32 differs); {GO_BACK}")
    if index.get("format") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format {index.get('format')!r}, this version reads {FORMAT_VERSION}; "
            "go on with the version that wrote it, or choose another run.dir"
        )
    files = index.get("files")
    if not isinstance(files, dict) or not all(is_file_name(name) for name in files):
        raise DamagedCheckpointError(f"{path} is damaged: its `files` are no names of files beside it; {GO_BACK}")
    return index


def verify_file(folder: Path, name: str, index: dict[str, Any]) -> Path:
    """Path of the file, which is whole. Raises DamagedCheckpointError when it is missing, cut short or changed."""
    path = folder / name
    entry = index["files"].get(name)
    if entry is None or not path.exists():
        raise DamagedCheckpointError(f"{path} is missing; {GO_BACK}")
    size = path.stat().st_size
    if size != entry["bytes"]:
        raise DamagedCheckpointError(f"{path} has {size} bytes, {entry['bytes']} were written; {GO_BACK}")
    try:
        crc = file_crc32(path)
    except OSError as error:
        raise DamagedCheckpointError(f"{path} cannot be read ({error.strerror}); {GO_BACK}") from error
    if crc != entry["crc32"]:
        raise DamagedCheckpointError(f"{path} is damaged (its CRC-32 differs); {GO_BACK}")
    return path


def _crc32(index: dict[str, Any]) -> int:
    """Of what the index says, however it is written down."""
    return zlib.crc32(json.dumps(index, sort_keys=True).encode())
