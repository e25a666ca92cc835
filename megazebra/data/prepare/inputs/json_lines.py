"""Lines of JSON, plain or compressed, as a stream."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from typing import BinaryIO

from megazebra.data.errors import CorpusError
from megazebra.data.prepare.inputs.tasks import JsonLinesTask

READ_BYTES = 2**20
# Zstandard's output comes by input chunk, and text compresses tenfold or more.
ZSTD_READ_BYTES = 2**16


def json_lines(task: JsonLinesTask) -> Iterator[tuple[int, bytes]]:
    """Bytes of the task read so far, and a line, blank ones included.

    Raises CorpusError for compressed data that is damaged or ends too early.
    """
    if task.file.is_compressed:
        yield from _compressed_lines(task)
        return
    with task.file.open() as file:
        position = task.start
        if task.start:
            # The line that is under way at `start` belongs to the task before, unless it ends there. It is not read
            # beyond `stop`: it may go on for many tasks.
            file.seek(task.start - 1)
            position += len(file.readline(task.bytes + 1)) - 1
        while position < task.stop and (line := file.readline()):
            position += len(line)
            yield min(position, task.stop) - task.start, line


def lines_before(task: JsonLinesTask) -> int:
    """Lines that begin before the task. Reads all of them."""
    lines, position = 0, 0
    with task.file.open() as file:
        while position < task.start and (line := file.readline()):
            position += len(line)
            lines += 1
    return lines


def _compressed_lines(task: JsonLinesTask) -> Iterator[tuple[int, bytes]]:
    damage: tuple[type[Exception], ...] = (EOFError, zlib.error, gzip.BadGzipFile)
    with task.file.open() as raw:
        stream: io.RawIOBase
        if task.file.path.endswith(".gz"):
            stream = gzip.GzipFile(fileobj=raw)  # type: ignore[assignment]
        else:
            stream, zstd_error = _open_zstd(task.file.path, raw)
            damage += (zstd_error,)
        try:
            for line in io.BufferedReader(stream, READ_BYTES):
                yield raw.tell(), line
        except damage as error:
            raise CorpusError(f"{task.file.path} is damaged or truncated ({error}); restore it") from error


def _open_zstd(path: str, raw: BinaryIO) -> tuple[io.RawIOBase, type[Exception]]:
    try:
        import zstandard
    except ImportError as error:
        raise CorpusError(f"{path}: reading .zst needs zstandard; pip install 'megazebra[data]'") from error
    # The largest window zstd --long writes; the default refuses more than 128 MB.
    return _ZstdStream(zstandard.ZstdDecompressor(max_window_size=2**31), raw), zstandard.ZstdError


class _ZstdStream(io.RawIOBase):
    """Frames of Zstandard as one stream. Unlike zstandard's own stream_reader it notices a frame that breaks off."""

    def __init__(self, decompressor, raw: BinaryIO) -> None:  # type: ignore[no-untyped-def]
        self._decompressor = decompressor
        self._raw = raw
        self._frame = decompressor.decompressobj()
        self._frame_begun = False
        self._output = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:  # type: ignore[no-untyped-def]
        while not self._output:
            data = b""
            if self._frame.eof:
                data = self._frame.unused_data
                self._frame, self._frame_begun = self._decompressor.decompressobj(), False
            data = data or self._raw.read(ZSTD_READ_BYTES)
            if not data:
                if self._frame_begun:
                    raise EOFError("the last frame has no end")
                return 0
            self._frame_begun = True
            self._output = memoryview(self._frame.decompress(data))
        count = min(len(buffer), len(self._output))
        buffer[:count] = self._output[:count]
        self._output = self._output[count:]
        return count
