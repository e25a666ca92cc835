"""What is read out of a task: every record once wherever the file is cut, and what is said of unusable ones."""

from __future__ import annotations

import gzip
import io
import json
import random
import sys
import tracemalloc

import pytest

from megazebra.data.errors import CorpusError
from megazebra.data.prepare.inputs.files import gather_files
from megazebra.data.prepare.inputs.records import RecordOptions, read_items
from megazebra.data.prepare.inputs.tasks import plan_tasks, text_documents

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")
zstandard = pytest.importorskip("zstandard")

TEXTS = [f"document {n} größer 🦓\n" * (n % 7 + 1) for n in range(200)]
ROWS = [{"id": n, "text": text, "meta": {"body": text.upper()}} for n, text in enumerate(TEXTS)]
LINES = b"".join(json.dumps(row, ensure_ascii=bool(row["id"] % 2)).encode() + b"\n" for row in ROWS)


def tasks_of(path, key="text", task_bytes=10**9):
    return plan_tasks([], gather_files([str(path)]), (key,), task_bytes)


def texts_of(path, key="text", task_bytes=10**9):
    options = RecordOptions(text_key=key)
    return [item.record for task in tasks_of(path, key, task_bytes) for item in read_items(task, options)]


def written(path, content):
    path.write_bytes(content)
    return path


def as_parquet(rows, path, **options):
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, **options)
    return path


@pytest.fixture(params=["jsonl", "jsonl.gz", "json.gz", "jsonl.zst", "parquet"])
def records(request, tmp_path):
    """The rows as a file of each kind; compressed ones of two members, as appending makes them."""
    path, half = tmp_path / f"rows.{request.param}", LINES.index(b"\n", len(LINES) // 2) - 5
    if request.param == "parquet":
        return as_parquet(ROWS, path, row_group_size=30)
    compress = {"gz": gzip.compress, "zst": zstandard.compress}.get(request.param.split(".")[-1], bytes)
    return written(path, compress(LINES[:half]) + compress(LINES[half:]))


def test_every_kind_gives_every_text_in_order(records):
    assert texts_of(records) == TEXTS
    assert texts_of(records, "meta.body") == [text.upper() for text in TEXTS]


def test_reading_goes_on_behind_a_record(records):
    for task in tasks_of(records, task_bytes=2000):
        items = list(read_items(task, RecordOptions()))
        behind = len(items) // 2
        assert list(read_items(task, RecordOptions(), behind=items[behind].number)) == items[behind + 1 :]


def test_positions_rise_to_the_size_of_the_task(records):
    for task in tasks_of(records, task_bytes=2000):
        positions = [item.position for item in read_items(task, RecordOptions())]
        assert positions == sorted(positions)
        assert 0 < positions[-1] <= task.bytes


@pytest.mark.parametrize("task_bytes", [1, 2, 7, 100, 1000, 5000])
def test_a_line_belongs_to_one_task_wherever_the_file_is_cut(tmp_path, task_bytes):
    path = written(tmp_path / "rows.jsonl", LINES[:3000].removesuffix(b"\n"))
    texts = [json.loads(line)["text"] for line in LINES[:3000].splitlines()[:-1]]
    path.write_bytes(b"\n".join(LINES.splitlines()[: len(texts)]))  # no line end at the end
    assert len(tasks_of(path, task_bytes=task_bytes)) == -(-path.stat().st_size // task_bytes)
    assert texts_of(path, task_bytes=task_bytes) == texts


def test_memory_of_a_task_inside_a_long_line_is_that_of_the_task(tmp_path):
    path = written(tmp_path / "rows.jsonl", b'{"text": "' + b"x" * 2**24 + b'"}\n{"text": "last"}\n')
    first, second, *_, last = tasks_of(path, task_bytes=2**16)
    tracemalloc.start()
    assert list(read_items(second, RecordOptions())) == []
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**22
    assert [len(item.record) for task in (first, last) for item in read_items(task, RecordOptions())] == [2**24, 4]


def test_lines_cut_at_their_very_ends(tmp_path):
    path = written(tmp_path / "rows.jsonl", b'{"text": "a"}\n' * 6)
    assert [len(list(read_items(task, RecordOptions()))) for task in tasks_of(path, task_bytes=14)] == [1] * 6


def test_parquet_is_cut_between_row_groups_and_read_by_column(tmp_path):
    path = as_parquet([{**row, "large": "x" * 5000} for row in ROWS], tmp_path / "rows.parquet", row_group_size=30)
    tasks = tasks_of(path, task_bytes=2000)
    assert [(task.first_row, task.rows) for task in tasks] == [(n, min(30, 200 - n)) for n in range(0, 200, 30)]
    assert sum(task.bytes for task in tasks) < 10 * sum(len(text.encode()) for text in TEXTS)
    assert texts_of(path, task_bytes=2000) == TEXTS


def test_memory_of_rows_that_repeat_a_dictionary_is_bounded(tmp_path):
    """The file counts a text once, however many rows have it."""
    texts = pyarrow.array(["x" * 10_000] * 6000).dictionary_encode()
    parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "rows.parquet")
    (task,) = tasks_of(tmp_path / "rows.parquet")
    tracemalloc.start()
    assert sum(1 for _ in read_items(task, RecordOptions())) == 6000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * 1024 * 10_000


def test_sides_depend_on_content_alone(tmp_path):
    options = RecordOptions(validation_share=0.3)
    held_out = {}
    for order in (ROWS, random.Random(0).sample(ROWS, len(ROWS))):
        path = as_parquet(order, tmp_path / "rows.parquet", row_group_size=7)
        lines = written(tmp_path / "rows.jsonl", b"".join(json.dumps(row).encode() + b"\n" for row in order))
        for tasks in (tasks_of(path), tasks_of(lines, task_bytes=500)):
            items = [item for task in tasks for item in read_items(task, options)]
            sides = {item.record: item.validation for item in items}
            assert held_out in ({}, sides)
            held_out = sides
    assert 30 <= sum(held_out.values()) <= 90


def test_conversations_are_passed_on_whole(tmp_path):
    rows = [{"messages": [{"role": "user", "content": "é"}]}]
    options = RecordOptions(text_key=None)
    lines = written(tmp_path / "rows.jsonl", json.dumps(rows[0]).encode())
    table = as_parquet(rows, tmp_path / "rows.parquet")
    for task in (*tasks_of(lines, "messages"), *tasks_of(table, "messages")):
        assert [item.record for item in read_items(task, options)] == rows


BAD = {
    b"{": ("is no JSON", "Expecting property name"),
    b"[" * 100_000: ("is no JSON", "recursion"),
    b"[1]": ("is no JSON object", "skip-bad"),
    b'{"text": "\xff"}': ("is not UTF-8", "invalid start byte"),
    b'{"id": 1, "txt": ""}': ("has no key 'text'", "its keys: 'id', 'txt'; see --text-key"),
    b'{"text": ["a"]}': ("has no text under 'text'", "but list; see --text-key"),
    b'{"text": null}': ("has no text under 'text'", "but NoneType"),
}


@pytest.mark.parametrize("line", BAD, ids=lambda line: line[:12].decode(errors="replace"))
@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz"])
def test_bad_lines_are_named_or_skipped(tmp_path, line, suffix):
    reason, details = BAD[line]
    content = b'\xef\xbb\xbf{"text": "first"}\n\n  \n' + line + b'\n{"text": "last"}\n'
    path = written(tmp_path / f"rows.{suffix}", gzip.compress(content) if suffix.endswith("gz") else content)
    for task_bytes in (10**9, 25):  # in the second case the bad line is in another task than the first
        with pytest.raises(CorpusError) as raised:
            texts_of(path, task_bytes=task_bytes)
        assert str(raised.value).startswith(f"{path}:4: the record {reason}")
        assert details in str(raised.value)
        assert "--skip-bad-records" in str(raised.value)
    (task,) = tasks_of(path)
    first, bad, last = read_items(task, RecordOptions(skip_bad_records=True))
    assert (first.record, bad.record, last.record) == ("first", None, "last")
    assert (bad.problem, bad.bad, bad.place, bad.number) == (reason, True, f"rows.{suffix}:4", 4)


def test_empty_text_is_no_error(tmp_path):
    path = written(tmp_path / "rows.jsonl", b'{"text": ""}\n{"text": "x"}')
    (task,) = tasks_of(path)
    empty, other = read_items(task, RecordOptions())
    assert (empty.problem, empty.bad, other.record) == ("is empty", False, "x")


def test_bad_rows_are_named(tmp_path):
    rows = [{"text": "x"}] * 70 + [{"text": None}]
    path = as_parquet(rows, tmp_path / "rows.parquet", row_group_size=30)
    with pytest.raises(CorpusError, match=rf"{path}, row 71: the record has no text under 'text'"):
        texts_of(path, task_bytes=1)
    with pytest.raises(CorpusError, match=r"has no column 'body' \(its columns: text\)"):
        tasks_of(path, "body")


@pytest.mark.parametrize("suffix", ["jsonl.gz", "jsonl.zst", "parquet"])
def test_damaged_files_are_refused(tmp_path, suffix):
    buffer = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), buffer, row_group_size=30)
    compress = {"jsonl.gz": gzip.compress, "jsonl.zst": zstandard.compress, "parquet": lambda _: buffer.getvalue()}
    whole = compress[suffix](LINES)
    damaged = bytearray(whole)
    damaged[4 : len(whole) // 2] = bytes(len(whole) // 2 - 4)
    path = tmp_path / f"rows.{suffix}"
    for content in (whole[:-3], whole[: len(whole) // 2], bytes(damaged), b"no such thing"):
        with pytest.raises(CorpusError, match=rf"{path} is (damaged or truncated|no Parquet file)"):
            texts_of(written(path, content))


@pytest.mark.parametrize(("library", "suffix"), [("zstandard", "jsonl.zst"), ("pyarrow", "parquet")])
def test_missing_libraries_are_named(tmp_path, monkeypatch, library, suffix):
    path = written(tmp_path / f"rows.{suffix}", b"x")
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(CorpusError, match=rf"needs {library}; pip install 'megazebra\[data\]'"):
        texts_of(path)


def test_files_without_records(tmp_path):
    assert texts_of(written(tmp_path / "rows.jsonl", b"")) == []
    assert texts_of(written(tmp_path / "rows.jsonl.zst", b"")) == []
    assert texts_of(written(tmp_path / "blank.jsonl", b"\n\n")) == []
    parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), tmp_path / "rows.parquet")
    assert texts_of(tmp_path / "rows.parquet") == []


def test_texts_of_a_directory_are_joined_line_by_line(tmp_path):
    for name, content in (
        ("a", b"\xef\xbb\xbfone"),
        ("b", b"two\r\n"),
        ("c", b""),
        ("d", "größer".encode("latin-1")),
        ("e", b"3"),
    ):
        written(tmp_path / name, content)
    documents = text_documents(gather_files([str(tmp_path)]), "directory", 0.0)
    (task,) = plan_tasks(documents, [], (), task_bytes=10**6)
    empty, foreign, document = read_items(task, RecordOptions())
    label = tmp_path.name
    assert (empty.problem, empty.place) == ("is empty", f"{label}/c")
    assert (foreign.problem, foreign.place) == ("is not UTF-8", f"{label}/d")
    assert (document.record, document.place, document.position) == ("one\ntwo\r\n3", label, task.bytes)
    assert list(read_items(task, RecordOptions(), behind=foreign.number)) == [document]
