"""Which files become documents, under which names, and on which side of the split."""

from __future__ import annotations

import os

import pytest

from megazebra.data.errors import CorpusError
from megazebra.data.prepare.text_files import gather_text_files, manifest_fingerprint, read_text, split_files


@pytest.fixture
def folder(tmp_path):
    for name in ("b.txt", "a.py", "sub/c.py", "sub/__pycache__/d.py", ".git/e.py", ".hidden.py", "site-packages/f.py"):
        path = tmp_path / "src" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return tmp_path / "src"


def names(*inputs, **options):
    return [file.name for file in gather_text_files([str(folder) for folder in inputs], **options)]


def test_names_are_sorted_and_relative(folder):
    assert names(folder) == ["src/a.py", "src/b.txt", "src/sub/c.py"]
    assert names(folder, globs=["*.txt", "c*"]) == ["src/b.txt", "src/sub/c.py"]
    assert names(folder, exclude=folder / "sub") == ["src/a.py", "src/b.txt"]


def test_inputs_called_alike_stay_apart(folder, tmp_path):
    other = tmp_path / "other" / "src"
    other.mkdir(parents=True)
    (other / "a.py").write_text("x")
    assert names(folder, other, globs=["a.py"]) == ["src-2/a.py", "src/a.py"]


def test_standard_library():
    found = gather_text_files(["stdlib"])
    assert {"stdlib/abc.py", "stdlib/json/decoder.py"} <= {file.name for file in found}
    assert all(file.name.endswith(".py") for file in found)
    assert not any("-packages/" in file.name or "__pycache__" in file.name for file in found)


def test_unusable_inputs_are_refused(folder, tmp_path):
    with pytest.raises(CorpusError, match=r"--input .*nowhere does not exist"):
        gather_text_files([str(tmp_path / "nowhere")])
    with pytest.raises(CorpusError, match="is not a folder"):
        gather_text_files([str(folder / "a.py")])
    with pytest.raises(CorpusError, match=r"has no file like \*\.rst"):
        gather_text_files([str(folder)], ["*.rst"])
    with pytest.raises(CorpusError, match="is the output folder too"):
        gather_text_files([str(folder)], exclude=folder)


def test_text_is_read_as_it_is(folder):
    (folder / "b.txt").write_bytes("é\r\n".encode())
    (file,) = gather_text_files([str(folder)], ["b.txt"])
    assert read_text(file) == "é\r\n"


def test_split_depends_on_names_alone(tmp_path):
    for n in range(400):
        (tmp_path / f"{n}.txt").write_text("x")
    files = gather_text_files([str(tmp_path)])
    train, validation = split_files(files, 0.1)
    assert sorted(train + validation) == files
    assert 20 <= len(validation) <= 60
    some = files[::3]
    assert split_files(some, 0.1)[1] == [file for file in validation if file in some]
    assert split_files(files, 0.0) == (files, [])


def test_small_folder_still_has_validation(folder):
    files = gather_text_files([str(folder)])
    train, validation = split_files(files, 1e-9)
    assert (len(train), len(validation)) == (2, 1)
    assert split_files(files[:1], 1e-9) == (files[:1], [])


def test_manifest_notices_a_touched_file(folder):
    before = manifest_fingerprint(gather_text_files([str(folder)]))
    assert manifest_fingerprint(gather_text_files([str(folder)])) == before
    os.utime(folder / "a.py", (1, 1))
    assert manifest_fingerprint(gather_text_files([str(folder)])) != before
