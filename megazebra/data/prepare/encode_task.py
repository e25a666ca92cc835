"""One task from its inputs to its parts, a batch at a time."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from megazebra.data.errors import CorpusError
from megazebra.data.prepare.encoders.encoded import DocumentEncoder, EncodedDocument, Refused
from megazebra.data.prepare.inputs.records import EMPTY, Item, RecordOptions, read_items
from megazebra.data.prepare.inputs.tasks import Task, gathered
from megazebra.data.prepare.open_encoder import EncoderOptions
from megazebra.data.prepare.parts import PartsFolder, PartWriter

LEAST_ITEM_BYTES = 64


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Where work is cut, in bytes of text. Memory follows `batch` and the longest record.

    task: of a file that is read from several places; a new tokenizer learns from the first records of each. part:
    what a restart may have to do again. batch: encoded at a time, for each thread. process: the least that is worth
    starting one.
    """

    task: int = 64 * 2**20
    part: int = 64 * 2**20
    batch: int = 2**20
    process: int = 8 * 2**20


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a worker has to know besides its tasks."""

    encoder: EncoderOptions
    records: RecordOptions
    parts: PartsFolder
    sizes: Sizes


class Progress(NamedTuple):
    """task: its number. position: bytes of it read so far. tokens: new ones."""

    task: int
    position: int
    tokens: int


def encode_task(number: int, task: Task, encoder: DocumentEncoder, work: Work) -> Iterator[Progress]:
    """Write the parts of the task that are not there yet; tells of its progress after every batch."""
    done = work.parts.done(number)
    if done and done[-1].complete:
        return
    items = read_items(task, work.records, behind=done[-1].stop if done else 0)
    # An item without any text counts too, so that a batch of them ends.
    batch_bytes = work.sizes.batch * (work.encoder.threads or 1)
    batches = gathered(items, lambda item: max(item.bytes, LEAST_ITEM_BYTES), batch_bytes)
    for part_number in itertools.count(len(done)):
        with PartWriter(work.parts.part(number, part_number), encoder) as part:
            written = 0
            for batch in batches:
                tokens_before = part.report.tokens
                _encode(batch, encoder, part, work.encoder.max_tokens)
                written += sum(item.bytes for item in batch)
                yield Progress(number, part.report.position, part.report.tokens - tokens_before)
                if written >= work.sizes.part:
                    break
            else:
                part.report.complete, part.report.position = True, task.bytes
            part.publish()
        if part.report.complete:
            break
    yield Progress(number, task.bytes, 0)


def _encode(batch: list[Item], encoder: DocumentEncoder, part: PartWriter, max_tokens: int | None) -> None:
    report = part.report
    good = [item for item in batch if not item.problem]
    for item in batch:
        if item.problem:
            report.skipped.add(item.problem, item.place)
            report.bad_records += item.bad
    sides: dict[bool, list[EncodedDocument]] = {False: [], True: []}
    for item, document in zip(good, _documents(good, encoder), strict=True):
        report.longest = max(report.longest, document.length)
        report.overlong += max_tokens is not None and document.length > max_tokens
        if isinstance(document, Refused):
            place = f"{item.place}, {document.details}" if document.details else item.place
            report.skipped.add(document.reason, place)
        elif len(document.tokens) == 0:
            report.skipped.add(EMPTY, item.place)
        else:
            sides[item.validation].append(document)
    for validation, documents in sides.items():
        part.add(documents, validation=validation)
    report.stop, report.position = batch[-1].number, batch[-1].position


def _documents(items: list[Item], encoder: DocumentEncoder) -> list[EncodedDocument | Refused]:
    try:
        return encoder.encode([item.record for item in items])
    except CorpusError:
        for item in items:  # which of them was it?
            try:
                encoder.encode([item.record])
            except CorpusError as error:
                raise CorpusError(f"{item.place}: {error}") from error
        raise
