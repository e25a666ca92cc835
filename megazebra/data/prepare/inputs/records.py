"""What becomes of a task's bytes: texts and conversations to encode, and what has to be left out."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from megazebra.data.errors import CorpusError
from megazebra.data.prepare.inputs.files import held_out
from megazebra.data.prepare.inputs.json_lines import json_lines, lines_before
from megazebra.data.prepare.inputs.parquet import open_parquet, parquet_rows
from megazebra.data.prepare.inputs.tasks import JsonLinesTask, ParquetTask, Task, TextTask

EMPTY = "is empty"
BYTE_ORDER_MARK = "\ufeff"


@dataclass(frozen=True, kw_only=True)
class RecordOptions:
    """What of a record becomes a document.

    text_key: key of the text, `a.b` for b inside a; None where records are conversations, passed on whole.
    skip_bad_records: leave unusable records out instead of refusing the input. validation_share: held out.
    """

    text_key: str | None = "text"
    skip_bad_records: bool = False
    validation_share: float = 0.0


class Item(NamedTuple):
    """One document to be, or the reason why there is none.

    record: text, or the parsed object of a conversation; None with a problem, which is words that follow 'it'. bad:
    the problem is an error unless bad records are to be skipped.
    number: within the task, from 1; blank lines are counted too. position: bytes of the task read so far. place: for
    people. bytes: of text.
    """

    number: int
    position: int
    place: str
    record: Any = None
    bytes: int = 0
    validation: bool = False
    problem: str = ""
    bad: bool = False


def read_items(task: Task, options: RecordOptions, behind: int = 0) -> Iterator[Item]:
    """The items of a task, those behind item number `behind`.

    Raises CorpusError for inputs that are damaged or have changed and, unless they are to be skipped, for records
    that are no JSON objects or lack the text.
    """
    if isinstance(task, TextTask):
        return itertools.islice(_text_items(task), behind, None)
    rows = json_lines(task) if isinstance(task, JsonLinesTask) else _parquet_rows(task)
    return _record_items(task, rows, options, behind)


def _text_items(task: TextTask) -> Iterator[Item]:
    numbers = itertools.count(1)
    position = 0
    for document in task.documents:
        position += document.bytes
        texts: list[str] = []
        for file in document.files:
            with file.open() as opened:
                content = opened.read()
            try:
                text = content.decode("utf-8").removeprefix(BYTE_ORDER_MARK)
            except UnicodeDecodeError:
                yield Item(next(numbers), position, file.name, problem="is not UTF-8")
                continue
            if not text:
                yield Item(next(numbers), position, file.name, problem=EMPTY)
                continue
            if texts and not texts[-1].endswith("\n"):
                texts.append("\n")  # the last line of a file is not the beginning of the next one's first
            texts.append(text)
        if texts:
            yield Item(next(numbers), position, document.name, "".join(texts), document.bytes, document.validation)


class _BadRecordError(Exception):
    """reason: words that follow 'it', the same for all such records."""

    def __init__(self, reason: str, details: str = "") -> None:
        super().__init__(reason, details)
        self.reason = reason
        self.details = f" ({details})" if details else ""


def _record_items(
    task: JsonLinesTask | ParquetTask, rows: Iterator[tuple[int, Any]], options: RecordOptions, behind: int
) -> Iterator[Item]:
    place = _place(task)
    for number, (position, row) in enumerate(rows, 1):
        if number <= behind or (isinstance(row, bytes) and not row.strip()):
            continue
        try:
            record = _parse(row) if isinstance(row, bytes) else row
            if options.text_key is not None:
                record = _text(record, options.text_key)
                content = record.encode("utf-8", "surrogatepass")
            else:
                content = json.dumps(record, sort_keys=True, default=str).encode()
        except _BadRecordError as bad:
            if not options.skip_bad_records:
                raise CorpusError(
                    f"{_exact_place(task, number)}: the record {bad.reason}{bad.details}; mend it, or pass "
                    "--skip-bad-records to leave such records out"
                ) from bad
            yield Item(number, position, f"{place}{number}", problem=bad.reason, bad=True)
            continue
        if not content:
            yield Item(number, position, f"{place}{number}", problem=EMPTY)
            continue
        validation = options.validation_share > 0 and held_out(content, options.validation_share)
        yield Item(number, position, f"{place}{number}", record, len(content), validation)


def _parse(line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line.decode("utf-8").removeprefix(BYTE_ORDER_MARK))
    except UnicodeDecodeError as error:
        raise _BadRecordError("is not UTF-8", str(error)) from error
    except (ValueError, RecursionError) as error:
        raise _BadRecordError("is no JSON", str(error)) from error
    if not isinstance(record, dict):
        raise _BadRecordError("is no JSON object")
    return record


def _parquet_rows(task: ParquetTask) -> Iterator[tuple[int, dict[str, Any]]]:
    bytes_per_row = task.bytes / max(task.rows, 1)
    with open_parquet(task.file) as parquet:
        rows = parquet_rows(parquet, task.columns, task.row_groups, bytes_per_row)
        for number, row in enumerate(rows, 1):
            yield int(number * bytes_per_row), row


def _text(record: dict[str, Any], key: str) -> str:
    """The text at `key`: a key of this name, or the way through nested objects that its dots describe."""
    value: Any = record
    for part in [key] if key in record else key.split("."):
        if not isinstance(value, dict) or part not in value:
            raise _BadRecordError(f"has no key {key!r}", f"its keys: {', '.join(map(repr, record))}; see --text-key")
        value = value[part]
    if not isinstance(value, str):
        raise _BadRecordError(f"has no text under {key!r}", f"but {type(value).__name__}; see --text-key")
    return value


def _place(task: JsonLinesTask | ParquetTask) -> str:
    if isinstance(task, ParquetTask):
        return f"{task.file.name}, row group {task.row_groups[0]}, row "
    return f"{task.file.name}:" if task.start == 0 else f"{task.file.name}, byte {task.start}, line "


def _exact_place(task: JsonLinesTask | ParquetTask, number: int) -> str:
    if isinstance(task, ParquetTask):
        return f"{task.file.path}, row {task.first_row + number}"
    return f"{task.file.path}:{lines_before(task) + number}"
