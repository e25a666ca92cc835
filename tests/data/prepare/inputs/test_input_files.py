"""Which files are read, under which names, and which documents they make on which side of the split."""

from __future__ import annotations

import os

import pytest

from megazebra.data.errors import CorpusError
from megazebra.data.prepare.inputs.files import gather_files, held_out, manifest_fingerprint
from megazebra.data.prepare.inputs.tasks import (
    TextDocument,
    TextTask,
    plan_tasks,
    text_documents,
    with_nearest_held_out,
)


@pytest.fixture
def folder(tmp_path):
    for name in ("b.txt", "a.py", "sub/c.py", "sub/__pycache__/d.py", ".git/e.py", ".hidden.py", "site-packages/f.py"):
        path = tmp_path / "src" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return tmp_path / "src"


def names(*inputs, **options):
    return [file.name for file in gather_files([str(given) for given in inputs], **options)]


def test_names_are_sorted_and_relative(folder):
    assert names(folder) == ["src/a.py", "src/b.txt", "src/sub/c.py"]
    assert names(folder, globs=["*.txt", "c*"]) == ["src/b.txt", "src/sub/c.py"]
    assert names(folder, exclude=folder / "sub") == ["src/a.py", "src/b.txt"]


def test_inputs_called_alike_stay_apart(folder, tmp_path):
    other = tmp_path / "other" / "src"
    other.mkdir(parents=True)
    (other / "a.py").write_text("x")
    assert names(folder, other, globs=["a.py"]) == ["src-2/a.py", "src/a.py"]


def test_a_file_is_an_input_of_its_own_whatever_the_globs(folder, tmp_path):
    other = tmp_path / "b.txt"
    other.write_text("x")
    assert names(folder / "b.txt", other, folder, globs=["*.py"]) == ["b.txt", "b.txt-2", "src/a.py", "src/sub/c.py"]


def test_standard_library():
    found = gather_files(["stdlib"])
    assert {"stdlib/abc.py", "stdlib/json/decoder.py"} <= {file.name for file in found}
    assert all(file.name.endswith(".py") for file in found)
    assert not any("-packages/" in file.name or "__pycache__" in file.name for file in found)


def test_unusable_inputs_are_refused(folder, tmp_path):
    with pytest.raises(CorpusError, match=r"--input .*nowhere does not exist"):
        gather_files([str(tmp_path / "nowhere")])
    with pytest.raises(CorpusError, match=r"has no file like \*\.rst"):
        gather_files([str(folder)], ["*.rst"])
    with pytest.raises(CorpusError, match="is the output folder too"):
        gather_files([str(folder)], exclude=folder)


def test_suffixes_tell_records_from_texts(tmp_path):
    records = (
        "a.jsonl",
        "a.jsonl.gz",
        "a.jsonl.zst",
        "a.json.gz",
        "a.json.zst",
        "a.ndjson",
        "a.ndjson.gz",
        "a.parquet",
    )
    for name in (*records, "a.json", "a.gz", "jsonl"):
        (tmp_path / name).write_text("x")
    found = gather_files([str(tmp_path)])
    assert {os.path.basename(file.path) for file in found if file.holds_records} == set(records)


def test_a_file_that_changed_is_not_read(folder):
    (file,) = gather_files([str(folder)], ["b.txt"])
    with file.open() as opened:
        assert opened.read() == b"b.txt"
    (folder / "b.txt").write_text("longer than it was")
    with pytest.raises(CorpusError, match=r"b\.txt has changed since the build began"), file.open():
        pytest.fail("it was opened")


def test_a_file_that_changes_while_it_is_read_is_not_taken(folder):
    (file,) = gather_files([str(folder)], ["b.txt"])
    reading = file.open()
    assert reading.__enter__().read() == b"b.txt"
    (folder / "b.txt").write_text("longer")
    with pytest.raises(CorpusError, match=r"b\.txt has changed"):
        reading.__exit__(None, None, None)


def test_a_link_is_called_what_its_user_calls_it(tmp_path):
    """Download caches keep files under their hashes and link to them."""
    (tmp_path / "blob").write_text("{}")
    (tmp_path / "rows.jsonl").symlink_to("blob")
    (file,) = gather_files([str(tmp_path / "rows.jsonl")])
    assert (file.name, file.holds_records) == ("rows.jsonl", True)


def test_split_depends_on_names_alone(tmp_path):
    for n in range(400):
        (tmp_path / f"{n}.txt").write_text("x")
    files = gather_files([str(tmp_path)])
    documents = text_documents(files, "file", 0.1)
    assert [document.files for document in documents] == [(file,) for file in files]
    assert 20 <= sum(document.validation for document in documents) <= 60
    assert text_documents(files[::3], "file", 0.1) == [d for d in documents if d.files[0] in files[::3]]
    assert not any(document.validation for document in text_documents(files, "file", 0.0))
    assert held_out(b"x", 1.0)


def test_small_folder_still_has_validation(folder):
    files = gather_files([str(folder)])
    documents = with_nearest_held_out(text_documents(files, "file", 1e-9))
    assert [document.validation for document in documents].count(True) == 1
    assert with_nearest_held_out(documents) == documents
    assert not with_nearest_held_out(text_documents(files[:1], "file", 1e-9))[0].validation


def test_directories_are_documents(folder):
    (folder / "sub.txt").write_text("a file beside the folder sub")
    (folder / "sub" / "b.py").write_text("before c")
    documents = text_documents(gather_files([str(folder)]), "directory", 0.5)
    assert [(document.name, [file.name for file in document.files]) for document in documents] == [
        ("src", ["src/a.py", "src/b.txt", "src/sub.txt"]),
        ("src/sub", ["src/sub/b.py", "src/sub/c.py"]),
    ]
    assert all(document.validation == held_out(document.name.encode(), 0.5) for document in documents)


def test_small_texts_share_a_task(folder):
    documents = text_documents(gather_files([str(folder)]), "file", 0.0)
    sizes = [document.bytes for document in documents]
    assert plan_tasks(documents, [], (), task_bytes=10**6) == [TextTask(tuple(documents))]
    assert [len(task.documents) for task in plan_tasks(documents, [], (), task_bytes=sizes[0] + 1)] == [2, 1]
    assert [task.bytes for task in plan_tasks(documents, [], (), task_bytes=1)] == sizes


def test_tasks_follow_the_names(folder):
    for name in ("0.jsonl", "aa.jsonl", "z.jsonl"):
        (folder / name).write_text('{"text": "x"}\n')
    files = gather_files([str(folder)])
    records = [file for file in files if file.holds_records]
    texts: list[TextDocument] = text_documents([file for file in files if not file.holds_records], "file", 0.0)
    tasks = plan_tasks(texts, records, ("text",), task_bytes=10**6)
    order = [
        [document.name for document in task.documents] if isinstance(task, TextTask) else task.file.name
        for task in tasks
    ]
    assert order == ["src/0.jsonl", ["src/a.py"], "src/aa.jsonl", ["src/b.txt", "src/sub/c.py"], "src/z.jsonl"]


def test_manifest_notices_a_touched_file(folder):
    before = manifest_fingerprint(gather_files([str(folder)]))
    assert manifest_fingerprint(gather_files([str(folder)])) == before
    os.utime(folder / "a.py", (1, 1))
    assert manifest_fingerprint(gather_files([str(folder)])) != before
