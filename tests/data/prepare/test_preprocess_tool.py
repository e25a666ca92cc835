"""tools/preprocess_data.py from the command line on a small folder."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
from pathlib import Path

import numpy as np
import pytest

from megazebra.data.corpus.indexed_corpus import Corpus
from megazebra.data.prepare import preprocess as preprocess_module
from megazebra.data.prepare import publish as publish_module
from megazebra.data.prepare.tokenizer import load_tokenizer

ROOT = Path(__file__).parents[3]
TOOL = ROOT / "tools" / "preprocess_data.py"
FILES = 40

specification = importlib.util.spec_from_file_location("preprocess_data", TOOL)
tool = importlib.util.module_from_spec(specification)
specification.loader.exec_module(tool)


def text(n: int) -> str:
    return "".join(f"def function_{n}_{i}(x):\n    return x * {i}\n" for i in range(n + 1))


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    for n in range(FILES):
        (folder / f"{n:02}.txt").write_text(text(n))
    (folder / "empty.txt").write_text("")
    (folder / "latin.txt").write_bytes("größer".encode("latin-1"))
    return folder


@pytest.fixture
def run(source, tmp_path, capsys):
    def run_tool(*options: str, tokenizer: tuple[str, ...] = ("--train-tokenizer", "300")) -> tuple[int, str]:
        output = ["--input", str(source), "--output", str(tmp_path / "out"), "--validation-share", "0.2"]
        code = tool.main([*output, *tokenizer, *options])
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    return run_tool


def content(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir() if path.is_file()}


ALL_FILES = {f"{name}.{suffix}" for name in ("train", "validation") for suffix in ("bin", "idx", "meta.json")}
ALL_FILES.add("tokenizer.json")


def test_every_file_is_a_document_that_ends_with_eod(run, tmp_path):
    code, output = run()
    assert code == 0
    assert set(content(tmp_path / "out")) == ALL_FILES
    tokenizer = load_tokenizer(tmp_path / "out" / "tokenizer.json")
    documents = []
    for name in ("train", "validation"):
        corpus = Corpus.open(tmp_path / "out" / name)
        corpus.verify()
        assert corpus.meta.tokenizer["fingerprint"] == content(tmp_path / "out")["tokenizer.json"]
        for i in range(corpus.documents):
            tokens = corpus.read(i).tolist()
            assert tokens[-1] == corpus.meta.eod_id == 0
            documents.append(tokenizer.decode(tokens[:-1]))
    assert sorted(documents) == sorted(text(n) for n in range(FILES))
    assert "skipped 1, each because it is not UTF-8, such as 'source/latin.txt'" in output
    assert "skipped 1, each because it is empty, such as 'source/empty.txt'" in output


def test_bar_to_beat_is_the_smoothed_unigram_model(run, tmp_path):
    _, output = run()
    train, validation = (Corpus.open(tmp_path / "out" / name) for name in ("train", "validation"))
    counts = [
        np.bincount(np.concatenate([corpus.read(i) for i in range(corpus.documents)]), minlength=train.vocab_size)
        for corpus in (train, validation)
    ]
    share = counts[0] / counts[0].sum()
    assert train.meta.unigram_entropy == pytest.approx(-sum(p * np.log(p) for p in share if p))
    model = (counts[0] + 1) / (counts[0].sum() + len(counts[0]))
    expected = -(counts[1] * np.log(model)).sum() / counts[1].sum()
    assert validation.meta.unigram_cross_entropy == pytest.approx(expected)
    assert train.meta.unigram_cross_entropy is None
    assert f"unigram cross-entropy {expected:.4f}" in output


def test_second_run_finds_the_work_done(run, tmp_path):
    run()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    code, output = run()
    assert code == 0
    assert "is up to date" in output
    assert "the bar to beat" in output
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before


def test_force_builds_the_same_again(run, tmp_path):
    run()
    before = content(tmp_path / "out")
    inode = (tmp_path / "out" / "train.bin").stat().st_ino
    code, output = run("--force")
    assert (code, "up to date" in output) == (0, False)
    assert content(tmp_path / "out") == before
    assert (tmp_path / "out" / "train.bin").stat().st_ino != inode


def test_other_options_or_inputs_are_refused_without_force(run, source, tmp_path):
    run()
    before = content(tmp_path / "out")
    code, output = run(tokenizer=("--train-tokenizer", "310"))
    assert code == 1
    assert "tokenizer was 'byte-level BPE of 300', is 'byte-level BPE of 310'); pass --force" in output
    (source / "00.txt").write_text("changed")
    code, output = run()
    assert (code, "manifest was" in output) == (1, True)
    assert content(tmp_path / "out") == before
    assert run("--force")[0] == 0


def test_existing_tokenizer_is_used(run, tmp_path):
    run()
    (tmp_path / "out" / "tokenizer.json").rename(tmp_path / "given.json")
    code, _ = run("--force", tokenizer=("--tokenizer", str(tmp_path / "given.json")))
    assert code == 0
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (tmp_path / "given.json").read_bytes()


def test_corpus_without_validation_replaces_one_with(run, tmp_path):
    run()
    code, output = run("--force", "--validation-share", "0")
    assert code == 0
    assert set(content(tmp_path / "out")) == {"train.bin", "train.idx", "train.meta.json", "tokenizer.json"}
    assert "bar to beat" not in output
    assert "is up to date" in run("--validation-share", "0")[1]


def test_incomplete_output_is_completed(run, tmp_path):
    run()
    before = content(tmp_path / "out")
    for missing in ("train.idx", "validation.idx", "tokenizer.json"):
        (tmp_path / "out" / missing).unlink()
        code, output = run()
        assert (code, "up to date" in output) == (0, False)
        assert content(tmp_path / "out") == before


def test_damaged_or_foreign_corpus_is_not_overwritten_silently(run, tmp_path):
    run()
    os.truncate(tmp_path / "out" / "train.bin", 10)
    code, output = run()
    assert (code, "holds a damaged corpus" in output, "--force" in output) == (1, True, True)
    run("--force")
    (tmp_path / "out" / "train.meta.json").unlink()
    code, output = run()
    assert (code, "of other inputs or options" in output) == (1, True)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--input", "nowhere"], "nowhere does not exist"),
        (["--glob", "*.rst"], "has no file like *.rst"),
        (["--glob", "latin.txt"], "there is no train document"),
        (["--eod", "</s>"], "no token '</s>'"),
        (["--validation-share", "1"], "outside [0, 1)"),
        (["--train-tokenizer", "100"], "at least 257"),
    ],
)
def test_errors_leave_nothing(run, tmp_path, options, complaint):
    code, output = run(*options)
    assert code == 1
    assert output.splitlines()[-1].startswith("error: ")
    assert complaint in output
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_bad_tokenizer_file(run, tmp_path):
    (tmp_path / "bad.json").write_text("{}")
    for path, complaint in ((tmp_path / "bad.json", "is no tokenizer"), (tmp_path / "none.json", "cannot be read")):
        code, output = run(tokenizer=("--tokenizer", str(path)))
        assert (code, complaint in output) == (1, True)


def test_failure_while_encoding_keeps_the_old_corpus(run, tmp_path, monkeypatch):
    run()
    before = content(tmp_path / "out")

    def disk_full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(publish_module, "unigram_cross_entropy", disk_full)
    code, output = run("--force")
    assert (code, "No space left" in output) == (1, True)
    assert (tmp_path / "out" / "parts").is_dir()
    monkeypatch.undo()
    assert content(tmp_path / "out") == before
    code, output = run("--force")
    assert (code, "going on behind 100% that are done" in output) == (0, True)
    assert {path.name for path in (tmp_path / "out").iterdir()} == ALL_FILES
    assert content(tmp_path / "out") == before


@pytest.mark.parametrize("survivors", range(7))
def test_replacement_cut_short_never_mixes_builds(run, source, tmp_path, monkeypatch, survivors):
    """Seven files are renamed into place; whichever rename is the last, what opens is of one build."""
    run()
    (source / "00.txt").write_text(text(FILES))
    renames = iter(range(survivors))
    rename = os.replace

    def replace_or_die(source, target):
        if Path(target).parent == tmp_path / "out" and next(renames, None) is None:
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "replace", replace_or_die)
    assert run("--force")[0] == 1
    assert not (tmp_path / "out" / "train.idx").exists()
    monkeypatch.setattr(os, "replace", rename)
    code, output = run()
    assert (code, "up to date" in output) == (0, False)
    assert {path.name for path in (tmp_path / "out").iterdir()} == ALL_FILES
    tokenizer = content(tmp_path / "out")["tokenizer.json"]
    for name in ("train", "validation"):
        corpus = Corpus.open(tmp_path / "out" / name)
        corpus.verify()
        assert corpus.meta.tokenizer["fingerprint"] == tokenizer


def test_two_builders_do_not_meet(run, tmp_path):
    (tmp_path / "out").mkdir()
    descriptor = os.open(tmp_path / "out", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    code, output = run()
    os.close(descriptor)
    assert (code, "another process is building" in output) == (1, True)
    assert run()[0] == 0


def test_tokenizer_learns_from_a_sample_of_much_text(run, monkeypatch):
    monkeypatch.setattr(preprocess_module, "TOKENIZER_TEXT_BYTES", 5000)
    code, output = run()
    assert (code, "on 0 MB of the text" in output) == (0, True)
