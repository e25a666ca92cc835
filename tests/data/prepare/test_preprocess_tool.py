"""tools/preprocess_data.py from the command line on a small folder of texts."""

from __future__ import annotations

import shutil
import time

import numpy as np
import pytest
from text_builds import ALL_FILES, FILES, content, text

from megazebra.data.corpus.indexed_corpus import Corpus
from megazebra.data.prepare import preprocess as preprocess_module
from megazebra.data.prepare.encoders.tokenizer import load_tokenizer


def test_every_file_is_a_document_that_ends_with_eod(build_texts, tmp_path):
    code, output = build_texts()
    assert code == 0
    assert set(content(tmp_path / "out")) == ALL_FILES
    tokenizer = load_tokenizer(tmp_path / "out" / "tokenizer.json")
    documents = []
    for name in ("train", "validation"):
        corpus = Corpus(tmp_path / "out" / name)
        corpus.verify()
        assert corpus.meta.tokenizer["fingerprint"] == content(tmp_path / "out")["tokenizer.json"]
        for i in range(corpus.documents):
            tokens = corpus.read(i).tolist()
            assert tokens[-1] == corpus.meta.eod_id == 0
            documents.append(tokenizer.decode(tokens[:-1]))
    assert sorted(documents) == sorted(text(n) for n in range(FILES))
    assert "skipped 1, each because it is not UTF-8, such as 'source/latin.txt'" in output
    assert "skipped 1, each because it is empty, such as 'source/empty.txt'" in output


def test_bar_to_beat_is_the_smoothed_unigram_model(build_texts, tmp_path):
    _, output = build_texts()
    train, validation = (Corpus(tmp_path / "out" / name) for name in ("train", "validation"))
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


def test_existing_tokenizer_is_used(build_texts, tmp_path):
    build_texts()
    (tmp_path / "out" / "tokenizer.json").rename(tmp_path / "given.json")
    code, _ = build_texts("--force", tokenizer=("--tokenizer", str(tmp_path / "given.json")))
    assert code == 0
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (tmp_path / "given.json").read_bytes()


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
def test_errors_leave_nothing(build_texts, tmp_path, options, complaint):
    code, output = build_texts(*options)
    assert code == 1
    assert output.splitlines()[-1].startswith("error: ")
    assert complaint in output
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_bad_tokenizer_file(build_texts, tmp_path):
    (tmp_path / "bad.json").write_text("{}")
    for path, complaint in ((tmp_path / "bad.json", "is no tokenizer"), (tmp_path / "none.json", "cannot be read")):
        code, output = build_texts(tokenizer=("--tokenizer", str(path)))
        assert (code, complaint in output) == (1, True)


@pytest.mark.parametrize(
    ("wrong", "sample_bytes", "code", "said"),
    [
        ("nowhere", 2**20, 0, "encoding with gigatoken"),
        ("function_1_", 2**20, 0, "not with gigatoken: gigatoken encodes 'def function_1_"),
        ("function_1_", 1, 1, "error: source/01.txt: gigatoken encodes 'def function_1_"),
    ],
    ids=["never", "in the sample", "later"],
)
def test_gigatoken_is_tried_on_a_sample_and_watched(
    build_texts, tmp_path, monkeypatch, install_faulty_gigatoken, wrong, sample_bytes, code, said
):
    install_faulty_gigatoken(wrong)
    monkeypatch.setattr(preprocess_module, "TRIAL_BYTES", sample_bytes)
    build_texts("--engine", "tokenizers")
    expected = content(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    found, output = build_texts()
    assert (found, said in output) == (code, True)
    if code:
        assert "use --engine tokenizers" in output
        assert not (tmp_path / "out" / "train.idx").exists()
        assert build_texts("--engine", "tokenizers")[0] == 0
    assert content(tmp_path / "out") == expected


def test_tokenizer_learns_from_a_sample_of_much_text(build_texts, monkeypatch):
    monkeypatch.setattr(preprocess_module, "TOKENIZER_TEXT_BYTES", 5000)
    code, output = build_texts()
    assert (code, "on 0 MB of the text" in output) == (0, True)


def test_progress_on_a_terminal_and_elsewhere(tool, monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(tool.time, "monotonic", lambda: now[0])
    progress = tool.Progress(is_terminal=False)
    for second, done, tokens in ((0.0, 200, 50), (2.0, 300, 100), (5.0, 400, 150), (10.0, 600, 250)):
        now[0] = second
        progress(done, 1000, tokens)
    assert capsys.readouterr().out.splitlines() == [
        "going on from 20%, 50 tokens are there",
        "encoded 40%, 150 tokens, 20 tokens/s, 00:15 left",
        "encoded 60%, 250 tokens, 20 tokens/s, 00:10 left",
    ]
    progress = tool.Progress(is_terminal=True)
    progress(200, 1000, 50)
    now[0] += 10.0
    time.sleep(0.15)  # the bar is drawn ten times a second at most
    progress(600, 1000, 250)
    progress.close()
    assert "20 tokens/s" in capsys.readouterr().err
