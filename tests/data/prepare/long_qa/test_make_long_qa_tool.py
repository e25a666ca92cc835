"""tools/make_long_qa.py, and its conversations on their way through tools/preprocess_data.py."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from megazebra.config import load_config
from megazebra.data.corpus.indexed_corpus import Corpus
from megazebra.data.prepare.encoders.tokenizer import byte_tokenizer, save_tokenizer
from megazebra.data.sources import open_validation_data
from megazebra.labels import IGNORE_INDEX

TOOL = Path(__file__).parents[4] / "tools" / "make_long_qa.py"
END = "<|im_end|>"


@pytest.fixture(scope="module")
def make_long_qa():
    specification = importlib.util.spec_from_file_location("make_long_qa", TOOL)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module.main


@pytest.fixture
def request_(texts):
    return ["--input", str(texts), "--lengths", "900", "--questions", "2", "--facts", "5", "--seed", "3"]


def test_the_loss_is_on_the_answers_alone(make_long_qa, run, request_, tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens(["<|im_start|>", END])
    (tmp_path / "model").mkdir()
    save_tokenizer(tokenizer, tmp_path / "model" / "tokenizer.json")
    assert make_long_qa([*request_, "--output", str(tmp_path / "qa"), "--train", "6", "--validation", "3"]) == 0
    conversations = [json.loads(line) for line in (tmp_path / "qa" / "train.jsonl").read_text().splitlines()]
    assert len(conversations) == 6
    chat = ("--tokenizer", str(tmp_path / "model"), "--chat-template", "chatml")
    code, output = run("--input", tmp_path / "qa" / "train.jsonl", "--validation-share", "0", tokenizer=chat)
    assert code == 0, output
    corpus = Corpus(tmp_path / "out" / "train")
    said = [
        [tokenizer.decode(corpus.read(number)[start:stop], skip_special_tokens=False) for start, stop in spans]
        for number in range(corpus.documents)
        for spans in [corpus.spans(number)]
    ]
    answers = [[question["answer"] + END for question in each["long_qa"]["questions"]] for each in conversations]
    assert said == answers

    options = [f"data.validation_path={corpus.prefix}", "data.seq_len=2000", "model.max_position_embeddings=2000"]
    (source,) = open_validation_data(load_config(None, options)).values()
    learned = []
    for index in range(source.samples.samples_per_epoch):
        labels = source.samples[index].labels
        learned.append(labels[labels != IGNORE_INDEX])
    text = tokenizer.decode(np.concatenate(learned), skip_special_tokens=False)
    assert sorted(text.split(END)[:-1]) == sorted(answer.removesuffix(END) for both in answers for answer in both)


def test_preview_shows_facts_and_answers_and_writes_nothing(make_long_qa, request_, tmp_path, capsys):
    before = set(tmp_path.rglob("*"))
    assert make_long_qa([*request_, "--dry-run", "--kinds", "chain"]) == 0
    shown = capsys.readouterr().out
    assert shown.count(">>> ") == shown.count(" <<<") == 4
    assert "of 900 characters" in shown
    assert shown.count("assistant: ") == 2
    assert set(tmp_path.rglob("*")) == before


def test_errors_are_messages(make_long_qa, tmp_path, capsys):
    assert make_long_qa(["--input", str(tmp_path / "none"), "--output", str(tmp_path / "qa")]) == 1
    assert "does not exist" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        make_long_qa(["--input", "stdlib"])
    assert "give --output FOLDER, or --dry-run" in capsys.readouterr().err
