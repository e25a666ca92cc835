"""kill -9 at any moment of a save: the next start finds a whole checkpoint, and the newest one that was announced."""

from __future__ import annotations

import random
import time
import zlib
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from support.distributed import forkserver

from megazebra.checkpoint.store import CheckpointStore, read_index, verify_file
from megazebra.config.schema import ParallelConfig
from megazebra.durable import write_synced
from megazebra.parallel.mesh import ParallelMesh

KILLS, FILES, FILE_BYTES = 50, 4, 1 << 18


def store_in(folder: Path) -> CheckpointStore:
    return CheckpointStore(folder, ParallelMesh.build(ParallelConfig()).world, keep_last=2)


def content(step: int) -> bytes:
    return step.to_bytes(8, "little") * (FILE_BYTES // 8)


def save_for_ever(folder: Path, step: int, announce: Connection) -> None:
    def write(partial: Path) -> dict[Path, Any]:
        paths = [partial / f"{number}.bin" for number in range(FILES)]
        for path in paths:
            write_synced(path, content(step))
        return {path: {"bytes": FILE_BYTES, "crc32": zlib.crc32(content(step))} for path in paths}

    store = store_in(folder)
    while True:
        step += 1
        store.save(step, write, {"step": step})
        announce.send(step)


def test_every_restart_finds_a_whole_checkpoint(tmp_path: Path) -> None:
    moments = random.Random(0)
    store, step, cut_short = store_in(tmp_path), 0, 0
    for _ in range(KILLS):
        announced, child_end = forkserver.Pipe(duplex=False)
        process = forkserver.Process(target=save_for_ever, args=(tmp_path, step, child_end))
        process.start()
        child_end.close()
        last = announced.recv()
        time.sleep(moments.uniform(0, 0.05))
        process.kill()
        process.join()
        while announced.poll():
            try:
                last = announced.recv()
            except EOFError:
                break
        latest = store.latest()
        assert latest is not None
        index = read_index(latest)
        step = index["step"]
        assert step >= last
        for file in index["files"]:
            assert verify_file(latest, file, index).read_bytes() == content(step)
        cut_short += any(tmp_path.glob("*.partial*"))
    assert cut_short > KILLS // 10, "hardly any kill met a save: this proves nothing"
