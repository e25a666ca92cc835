"""The parts a build is made of: small corpora that appear whole or not at all, so that a build cut short can go on."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from megazebra.data.corpus.corpus_writer import CorpusWriter
from megazebra.data.errors import CorpusError
from megazebra.data.prepare.encoders.encoded import DocumentEncoder, EncodedDocument
from megazebra.durable import PARTIAL_SUFFIX, partial_path, sync_folder, write_synced

# Hidden, so that it is no input where the output folder lies among the inputs.
PARTS = ".parts"
BUILD_PREFIX = "build-"
REPORT = "part.json"


@dataclass
class Skipped:
    """Records left out. counts and examples: how many, and the place of one, by reason."""

    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, str] = field(default_factory=dict)

    def add(self, reason: str, place: str, count: int = 1) -> None:
        self.counts[reason] = self.counts.get(reason, 0) + count
        self.examples.setdefault(reason, place)

    def merge(self, other: Skipped) -> None:
        for reason, count in other.counts.items():
            self.add(reason, other.examples[reason], count)

    def lines(self) -> list[str]:
        """A sentence for each reason."""
        return [
            f"skipped {count:,}, each because it {reason}, such as {self.examples[reason]!r}"
            for reason, count in self.counts.items()
        ]


@dataclass
class PartReport:
    """What a part holds.

    stop: number of the last item of its task that is in it. position: bytes of the task read until then.
    complete: whether it is the last part of its task. corpora: names of those it has documents for. tokens: in them.
    longest: document, in tokens, and overlong: how many are beyond --max-tokens, both before any was truncated or
    dropped. skipped: all that was left out; bad_records: how many of it only because of --skip-bad-records.
    """

    stop: int = 0
    position: int = 0
    complete: bool = False
    corpora: list[str] = field(default_factory=list)
    tokens: int = 0
    longest: int = 0
    overlong: int = 0
    skipped: Skipped = field(default_factory=Skipped)
    bad_records: int = 0

    def to_json(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @classmethod
    def read(cls, path: Path) -> PartReport:
        fields = json.loads(path.read_bytes())
        return cls(**{**fields, "skipped": Skipped(**fields["skipped"])})


class PartsFolder:
    """Where the parts of one build lie; its name is that of the build, so that parts of another never count."""

    def __init__(self, output: str | os.PathLike[str], build: str) -> None:
        self.path = Path(output, PARTS, BUILD_PREFIX + build)

    def prepare(self, *, with_bad_records: bool) -> None:
        """Make the folder; remove what killed processes left and, unless told, parts that left bad records out."""
        self.path.mkdir(parents=True, exist_ok=True)
        if not with_bad_records:
            for part in self._finished():
                if PartReport.read(part / REPORT).bad_records:
                    # Not removed file by file under this name: what is left of it could pass for a part.
                    os.rename(part, partial_path(part))
        for unfinished in self.path.glob(f"*-*{PARTIAL_SUFFIX}"):
            shutil.rmtree(unfinished, ignore_errors=True)  # the killed build's worker may be alive for another batch

    def has_neighbours(self) -> bool:
        """Whether parts of other builds are there."""
        return any(other != self.path for other in self._builds())

    def part(self, task: int, number: int) -> Path:
        return self.path / f"{task:06}-{number:04}"

    def done(self, task: int) -> list[PartReport]:
        """The finished parts of a task, from its first."""
        reports: list[PartReport] = []
        while (path := self.part(task, len(reports)) / REPORT).exists():
            reports.append(PartReport.read(path))
        return reports

    def holds_documents(self) -> bool:
        return any(any(part.glob("*.idx")) for part in self._finished())

    def remove(self) -> None:
        self._remove([self.path])

    def remove_all(self) -> None:
        """Remove the parts of all builds."""
        self._remove(self._builds())

    def _builds(self) -> list[Path]:
        return list(self.path.parent.glob(f"{BUILD_PREFIX}*"))

    def _remove(self, builds: Iterable[Path]) -> None:
        for build in builds:
            shutil.rmtree(build, ignore_errors=True)
        with contextlib.suppress(OSError):  # not there, or not empty
            self.path.parent.rmdir()

    def _finished(self) -> list[Path]:
        return [path.parent for path in self.path.glob(f"*/{REPORT}") if path.parent.suffix != PARTIAL_SUFFIX]


def corpus_writer(prefix: Path, encoder: DocumentEncoder) -> CorpusWriter:
    """For documents of this encoder."""
    return CorpusWriter(prefix, vocab_size=encoder.vocab_size, eod_id=encoder.eod_id, with_spans=encoder.has_spans)


class PartWriter:
    """Context manager that writes one part. Without `publish`, and on an error, nothing stays."""

    def __init__(self, target: Path, encoder: DocumentEncoder) -> None:
        self._target = target
        self._encoder = encoder
        self._writers: dict[str, CorpusWriter] = {}
        self._open_writers = contextlib.ExitStack()
        self.report = PartReport()

    def __enter__(self) -> PartWriter:
        # Its own folder, not one named after the part: a killed build's worker may be alive for another batch.
        self._folder = Path(
            tempfile.mkdtemp(prefix=f"{self._target.name}.", suffix=PARTIAL_SUFFIX, dir=self._target.parent)
        )
        return self

    def add(self, documents: Sequence[EncodedDocument], *, validation: bool) -> None:
        if not documents:
            return
        name = "validation" if validation else "train"
        if name not in self._writers:
            self._writers[name] = self._open_writers.enter_context(corpus_writer(self._folder / name, self._encoder))
            self.report.corpora.append(name)
        spans: list[Any] | None = [document.spans for document in documents] if self._encoder.has_spans else None
        self._writers[name].add_documents([document.tokens for document in documents], spans)
        self.report.tokens += sum(len(document.tokens) for document in documents)

    def publish(self) -> None:
        self._open_writers.close()
        write_synced(self._folder / REPORT, self.report.to_json())
        sync_folder(self._folder)
        try:
            os.rename(self._folder, self._target)
        except OSError:
            # A killed build's worker was faster. What it wrote is the same, unless that build had other --workers.
            if not (self._target / REPORT).exists():
                raise
            if PartReport.read(self._target / REPORT) != self.report:
                raise CorpusError(
                    f"a process of an earlier build was still at work in {self._target}; try again"
                ) from None
        sync_folder(self._target.parent)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open_writers.__exit__(kind, error, trace)
        shutil.rmtree(self._folder, ignore_errors=True)
