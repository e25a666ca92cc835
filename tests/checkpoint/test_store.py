"""Checkpoint folders are complete or not there, and damage is named."""

from __future__ import annotations

import errno
import json
import threading
import zlib
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from support.distributed import run_distributed

from megazebra.checkpoint.store import (
    CheckpointError,
    CheckpointStore,
    DamagedCheckpointError,
    read_index,
    verify_file,
)
from megazebra.config.schema import ParallelConfig
from megazebra.durable import file_crc32
from megazebra.errors import PassingError
from megazebra.parallel.mesh import ParallelMesh


def store_in(folder: Path, keep_last: int = 2) -> CheckpointStore:
    return CheckpointStore(folder, ParallelMesh.build(ParallelConfig()).world, keep_last)


def writer(rank: int, content: bytes = b"weights") -> Any:
    def write(folder: Path) -> dict[Path, Any]:
        path = folder / f"rank_{rank}.bin"
        path.write_bytes(content)
        return {path: {"bytes": len(content), "crc32": zlib.crc32(content), "from": rank}}

    return write


def save_many(store: CheckpointStore, steps: list[int]) -> None:
    for step in steps:
        store.save(step, writer(0, f"step {step}".encode()), {"step": step})


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_latest_points_to_the_newest_and_old_ones_go(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    assert store.latest() is None
    save_many(store, [5, 10, 100, 1000])
    assert names(tmp_path) == ["latest", "step_00000100", "step_00001000"]
    latest = store.latest()
    assert latest == tmp_path / "step_00001000"
    seen: list[bytes] = []
    index = store.load(latest, lambda folder, index: seen.append(verify_file(folder, "rank_0.bin", index).read_bytes()))
    assert index["step"] == 1000
    assert seen == [b"step 1000"]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    save_many(store, [5])
    store.save(5, writer(0, b"second"), {})
    assert (tmp_path / "step_00000005" / "rank_0.bin").read_bytes() == b"second"


def test_some_are_kept_for_good(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, ParallelMesh.build(ParallelConfig()).world, keep_last=1, keep_every=20)
    save_many(store, [10, 20, 30, 40, 50])
    assert names(tmp_path) == ["latest", "step_00000020", "step_00000040", "step_00000050"]


def test_it_is_not_there_before_it_is_finished(tmp_path: Path) -> None:
    store, may_write = store_in(tmp_path), threading.Event()

    def write(folder: Path) -> dict[Path, Any]:
        may_write.wait()
        return writer(0)(folder)

    save_many(store, [5])
    saving = store.begin(10, write, {})
    assert not store.all_written(saving)
    assert store.latest() == tmp_path / "step_00000005"
    may_write.set()
    assert store.finish(saving).bytes == 7
    assert store.latest() == tmp_path / "step_00000010"
    assert store.older_than(tmp_path / "step_00000010") == tmp_path / "step_00000005"
    assert store.older_than(tmp_path / "step_00000005") is None


def test_a_leftover_of_a_killed_save_is_no_checkpoint(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    save_many(store, [5])
    leftover = tmp_path / "step_00000010.partial"
    leftover.mkdir()
    (leftover / "rank_0.bin").write_bytes(b"half")
    assert store.latest() == tmp_path / "step_00000005"
    save_many(store, [10])
    assert names(tmp_path) == ["latest", "step_00000005", "step_00000010"]


def full_disk(folder: Path) -> dict[Path, Any]:
    (folder / "half.bin").write_bytes(b"half")
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_leaves_the_last_checkpoint_and_nothing_else(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    save_many(store, [5])
    with pytest.raises(CheckpointError, match=r"cannot write .*step_00000010.*No space left on device"):
        store.save(10, full_disk, {})
    assert names(tmp_path) == ["latest", "step_00000005"]
    assert store.latest() == tmp_path / "step_00000005"


def test_a_file_that_the_disk_cannot_read_is_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = store_in(tmp_path)
    save_many(store, [5])
    name = next(iter(read_index(tmp_path / "step_00000005")["files"]))
    unreadable = OSError(errno.EIO, "Input/output error")
    monkeypatch.setattr("zlib.crc32", Mock(side_effect=unreadable))
    with pytest.raises(OSError, match="step_00000005") as raised:
        file_crc32(tmp_path / "step_00000005" / name)
    assert raised.value.filename is not None, "which the message to the user needs"
    monkeypatch.setattr("megazebra.checkpoint.store.file_crc32", Mock(side_effect=unreadable))
    index = {"files": {name: {"bytes": (tmp_path / "step_00000005" / name).stat().st_size, "crc32": 0}}}
    with pytest.raises(DamagedCheckpointError, match=rf"{name} cannot be read \(Input/output error\)"):
        verify_file(tmp_path / "step_00000005", name, index)


def test_a_file_server_that_is_gone_is_no_mistake_of_the_users(tmp_path: Path) -> None:
    """A run that ends so is started again."""
    store = store_in(tmp_path)
    with pytest.raises(PassingError, match=r"cannot write .*Stale file handle"):
        store.save(5, Mock(side_effect=OSError(errno.ESTALE, "Stale file handle")), {})
    assert names(tmp_path) == []


def save_with_rank_1_failing(folder: str) -> str:
    mesh = ParallelMesh.build(ParallelConfig())
    store = CheckpointStore(Path(folder), mesh.world, 2)
    store.save(5, writer(mesh.world.rank), {})
    try:
        store.save(10, full_disk if mesh.world.rank == 1 else writer(mesh.world.rank), {})
    except CheckpointError as error:
        return str(error)
    return "saved"


def test_one_rank_that_cannot_write_is_an_error_on_all(tmp_path: Path) -> None:
    messages = run_distributed(save_with_rank_1_failing, 3, str(tmp_path))
    assert len(set(messages)) == 1
    assert "rank 1: OSError: [Errno 28] No space left on device" in messages[0]
    assert names(tmp_path) == ["latest", "step_00000005"]
    assert names(tmp_path / "step_00000005") == ["index.json", "rank_0.bin", "rank_1.bin", "rank_2.bin"]


def ask_while_rank_1_writes(folder: str) -> tuple[bool, bool]:
    world = ParallelMesh.build(ParallelConfig()).world
    store, may_write = CheckpointStore(Path(folder), world, 2), threading.Event()

    def write(partial: Path) -> dict[Path, Any]:
        if world.rank == 1:
            may_write.wait()
        return writer(world.rank)(partial)

    saving = store.begin(5, write, {})
    if world.rank != 1:
        saving.outcome()
    before = store.all_written(saving)
    may_write.set()
    saving.outcome()
    after = store.all_written(saving)
    store.finish(saving)
    return before, after


def test_all_have_written_when_the_last_one_has(tmp_path: Path) -> None:
    assert run_distributed(ask_while_rank_1_writes, 3, str(tmp_path)) == [(False, True)] * 3


def change_index(folder: Path, old: str, new: str) -> None:
    text = (folder / "index.json").read_text()
    assert old in text
    (folder / "index.json").write_text(text.replace(old, new))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[3] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: flip(f / "rank_0.bin"), r"rank_0.bin is damaged"),
        (lambda f: (f / "rank_0.bin").write_bytes(b"wei"), r"rank_0.bin has 3 bytes, 6 were written"),
        (lambda f: (f / "rank_0.bin").unlink(), r"rank_0.bin is missing"),
        (lambda f: (f / "index.json").unlink(), r"index.json is missing or damaged"),
        (lambda f: (f / "index.json").write_text('{"format": 2, "fil'), r"index.json is missing or damaged"),
        (lambda f: change_index(f, '"step": 5', '"step": 6'), r"index.json is damaged"),
        (lambda f: (f / "index.json").write_text("[]"), r"index.json is damaged"),
        (lambda f: (f / "index.json").write_text(json.dumps({"format": 99})), r"format 99, this version reads 3"),
    ],
)
def test_damage_is_named(tmp_path: Path, damage: Any, message: str) -> None:
    store = store_in(tmp_path)
    save_many(store, [5])
    folder = tmp_path / "step_00000005"
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        store.load(folder, lambda folder, index: verify_file(folder, "rank_0.bin", index) and None)


def test_index_says_what_is_inside(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    index = read_index(store.save(5, writer(0), {"progress": {"step": 5}}).folder)
    assert index["progress"] == {"step": 5}
    assert index["files"]["rank_0.bin"]["bytes"] == 7
    assert index["files"]["rank_0.bin"]["from"] == 0
