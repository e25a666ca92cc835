"""An open `.bin`, read with `pread`: no file position to share, and a file that shrinks is a short read.

Nothing is memory-mapped: a mapped file that is truncated or rewritten in place kills the process with a bus error,
and the page cache is shared either way.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable

from megazebra.data.corpus.index_format import REBUILD
from megazebra.data.corpus.sidecar import BlockChecksums
from megazebra.data.errors import CorpusError

READ_BYTES = 2**20


class BinFile:
    """path; descriptor: -1 once closed; size: bytes when it was opened. Threads and forks may share it."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._close = weakref.finalize(self, os.close, self.descriptor)
        self.size = os.fstat(self.descriptor).st_size

    def read_into(self, target: memoryview, offset: int) -> None:
        """Fill `target` with the bytes from `offset` on; raises CorpusError when the file ends before."""
        while len(target):  # the kernel may hand out less than asked, 2 GB at most
            count = os.preadv(self.descriptor, [target], offset)
            if count == 0:
                raise CorpusError(
                    f"{self.path} ends at byte {offset} although it had {self.size} bytes when it was opened: it was "
                    f"truncated or rewritten in place; {REBUILD}"
                )
            target = target[count:]
            offset += count

    def verify(self, block_bytes: int, recorded: list[int], progress: Callable[[int, int], None] | None = None) -> None:
        """Compare the CRC-32 of every block; `progress` hears the bytes done and the file's size.

        Raises CorpusError naming the first block that differs.
        """
        checksums = BlockChecksums(block_bytes)
        chunk = memoryview(bytearray(READ_BYTES))
        for offset in range(0, self.size, READ_BYTES):
            piece = chunk[: self.size - offset]
            self.read_into(piece, offset)
            checksums.update(piece)
            if progress is not None:
                progress(offset + len(piece), self.size)
        if len(checksums.blocks) != len(recorded):
            raise CorpusError(
                f"{self.path} has {len(checksums.blocks)} blocks, its sidecar {len(recorded)} checksums; {REBUILD}"
            )
        for block, (found, expected) in enumerate(zip(checksums.blocks, recorded, strict=True)):
            if found != expected:
                start = block * block_bytes
                raise CorpusError(
                    f"{self.path} does not match its checksum in block {block}, bytes {start} to "
                    f"{min(start + block_bytes, self.size)}; {REBUILD}"
                )

    def close(self) -> None:
        """Close the file; reading it afterwards is an error. Also happens when this object is collected."""
        self._close()
        self.descriptor = -1  # the number may soon be another file's
