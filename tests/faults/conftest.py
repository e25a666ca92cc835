"""The table of what the fault suite has seen, printed at its end."""

from __future__ import annotations

import subprocess
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from megazebra.data.corpus.corpus_writer import CorpusWriter

_WIDTH = 46
_KEY = pytest.StashKey[list["Row"]]()


@dataclass(frozen=True)
class Row:
    """steps_lost: made and not saved when the run ended. seconds: from the fault to the end of the last process; None
    where the run goes on."""

    fault: str
    expected: str
    observed: str
    steps_lost: int
    seconds: float | None

    def lines(self) -> Iterator[str]:
        cells = [textwrap.wrap(text, _WIDTH) for text in (self.fault, self.expected, self.observed)]
        for number in range(max(map(len, cells))):
            line = "  ".join(f"{cell[number] if number < len(cell) else '':{_WIDTH}}" for cell in cells)
            seconds = "goes on" if self.seconds is None else f"{self.seconds:.1f}"
            yield line + (f"  {self.steps_lost:5}  {seconds:>7}" if number == 0 else "")


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Takes the fields of a Row."""
    rows = request.config.stash.setdefault(_KEY, [])
    return lambda *fields: rows.append(Row(*fields))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MB of its own."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", disk], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"needs the right to mount a file system: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    rows = terminalreporter.config.stash.get(_KEY, [])
    if rows:
        terminalreporter.section("faults")
        header = "  ".join(f"{name:{_WIDTH}}" for name in ("fault", "expected", "observed"))
        terminalreporter.write_line(f"{header}  lost   to stop")
        for row in rows:
            for line in row.lines():
                terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4 documents in which every token follows from the one before."""
    folder = tmp_path_factory.mktemp("corpus")
    for name in ("train", "validation"):
        with CorpusWriter(folder / name, vocab_size=512) as writer:
            for stride in (1, 3, 5, 7):
                writer.add_document([token * stride % 512 for token in range(8192)])
    return folder
