"""What becomes of an output folder that holds something: the work done, other builds, half of one, files of others."""

from __future__ import annotations

import fcntl
import os
import shutil
from pathlib import Path

import pytest
from text_builds import ALL_FILES, FILES, content, text

from megazebra.data.corpus.indexed_corpus import Corpus
from megazebra.data.prepare import publish as publish_module
from megazebra.data.prepare.encoders.tokenizer import byte_tokenizer, save_tokenizer


def test_second_run_finds_the_work_done(build_texts, tmp_path):
    build_texts()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    code, output = build_texts()
    assert code == 0
    assert "is up to date" in output
    assert "the bar to beat" in output
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before


def test_force_builds_the_same_again(build_texts, tmp_path):
    build_texts()
    before = content(tmp_path / "out")
    inode = (tmp_path / "out" / "train.bin").stat().st_ino
    code, output = build_texts("--force")
    assert (code, "up to date" in output) == (0, False)
    assert content(tmp_path / "out") == before
    assert (tmp_path / "out" / "train.bin").stat().st_ino != inode


def test_other_options_or_inputs_are_refused_without_force(build_texts, texts, tmp_path):
    build_texts()
    before = content(tmp_path / "out")
    code, output = build_texts(tokenizer=("--train-tokenizer", "310"))
    assert code == 1
    assert "tokenizer was 'byte-level BPE of 300', is 'byte-level BPE of 310'); pass --force" in output
    (texts / "00.txt").write_text("changed")
    code, output = build_texts()
    assert (code, "manifest was" in output) == (1, True)
    assert content(tmp_path / "out") == before
    assert build_texts("--force")[0] == 0


def test_corpus_without_validation_replaces_one_with(build_texts, tmp_path):
    build_texts()
    code, output = build_texts("--force", "--validation-share", "0")
    assert code == 0
    assert set(content(tmp_path / "out")) == {"train.bin", "train.idx", "train.meta.json", "tokenizer.json"}
    assert "bar to beat" not in output
    assert "is up to date" in build_texts("--validation-share", "0")[1]


def test_incomplete_output_is_completed(build_texts, tmp_path):
    build_texts()
    before = content(tmp_path / "out")
    for missing in ("train.idx", "validation.idx", "tokenizer.json"):
        (tmp_path / "out" / missing).unlink()
        code, output = build_texts()
        assert (code, "up to date" in output) == (0, False)
        assert content(tmp_path / "out") == before


def test_damaged_or_foreign_corpus_is_not_overwritten_silently(build_texts, tmp_path):
    build_texts()
    os.truncate(tmp_path / "out" / "train.bin", 10)
    code, output = build_texts()
    assert (code, "holds a damaged corpus" in output, "--force" in output) == (1, True, True)
    build_texts("--force")
    (tmp_path / "out" / "train.meta.json").unlink()
    code, output = build_texts()
    assert (code, "of other inputs or options" in output) == (1, True)


def test_failure_while_encoding_keeps_the_old_corpus(build_texts, tmp_path, monkeypatch):
    build_texts()
    before = content(tmp_path / "out")

    def disk_full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(publish_module, "unigram_cross_entropy", disk_full)
    code, output = build_texts("--force")
    assert (code, "No space left" in output) == (1, True)
    assert (tmp_path / "out" / ".parts").is_dir()
    monkeypatch.undo()
    assert content(tmp_path / "out") == before
    code, output = build_texts("--force")
    assert (code, "going on from 100%, " in output) == (0, True)
    assert {path.name for path in (tmp_path / "out").iterdir()} == ALL_FILES
    assert content(tmp_path / "out") == before


def test_what_else_lies_in_the_output_folder_stays(run, texts, tmp_path):
    """Inputs among it, whatever they are called; parts left by an earlier build are no inputs."""
    inputs = [tmp_path / "out" / name for name in ("parts", ".parts")]
    for folder in inputs:
        shutil.copytree(texts, folder)
    leftover = tmp_path / "out" / "parts" / ".parts" / "build-0" / "x.txt"
    leftover.parent.mkdir(parents=True)
    leftover.write_text("left by a build in this folder")
    before = [content(folder) for folder in inputs]
    assert run("--input", *inputs)[0] == 0
    assert [content(folder) for folder in inputs] == before
    assert sum(Corpus(tmp_path / "out" / name).documents for name in ("train", "validation")) == 2 * FILES


def test_folder_of_the_tokenizer_is_not_built_in(build_texts, tmp_path):
    (tmp_path / "out").mkdir()
    save_tokenizer(byte_tokenizer(), tmp_path / "out" / "tokenizer.json")
    for given in (tmp_path / "out", tmp_path / "out" / "tokenizer.json"):
        code, output = build_texts(tokenizer=("--tokenizer", str(given)))
        assert (code, "is the folder of the tokenizer" in output) == (1, True)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["tokenizer.json"]
    build_texts(tokenizer=("--tokenizer", "bytes"))
    assert "is up to date" in build_texts(tokenizer=("--tokenizer", str(tmp_path / "out")))[1]


@pytest.mark.parametrize("survivors", range(7))
def test_replacement_cut_short_never_mixes_builds(build_texts, texts, tmp_path, monkeypatch, survivors):
    """Seven files are renamed into place; whichever rename is the last, what opens is of one build."""
    build_texts()
    (texts / "00.txt").write_text(text(FILES))
    renames = iter(range(survivors))
    rename = os.replace

    def replace_or_die(source, target):
        if Path(target).parent == tmp_path / "out" and next(renames, None) is None:
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "replace", replace_or_die)
    assert build_texts("--force")[0] == 1
    assert not (tmp_path / "out" / "train.idx").exists()
    monkeypatch.setattr(os, "replace", rename)
    code, output = build_texts()
    assert (code, "up to date" in output) == (0, False)
    assert {path.name for path in (tmp_path / "out").iterdir()} == ALL_FILES
    tokenizer = content(tmp_path / "out")["tokenizer.json"]
    for name in ("train", "validation"):
        corpus = Corpus(tmp_path / "out" / name)
        corpus.verify()
        assert corpus.meta.tokenizer["fingerprint"] == tokenizer


def test_two_builders_do_not_meet(build_texts, tmp_path):
    (tmp_path / "out").mkdir()
    descriptor = os.open(tmp_path / "out", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    code, output = build_texts()
    os.close(descriptor)
    assert (code, "another process is building" in output) == (1, True)
    assert build_texts()[0] == 0
