"""tools/evaluate.py as a user starts it; what it measures is tested in tests/evaluate."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from models.zebras import make_model, small_config
from support.command_line import ROOT, environment, finish, run_alone

from megazebra.checkpoint.model_folder import ModelFolderWriter
from megazebra.checkpoint.weights import open_weights
from megazebra.data.corpus.corpus_writer import CorpusWriter
from megazebra.data.prepare.encoders.tokenizer import byte_tokenizer, serialize, train_byte_level_bpe
from megazebra.errors import UserError
from megazebra.evaluate.results import load_results

TOOL = str(ROOT / "tools" / "evaluate.py")
VOCABULARY = 257


@pytest.fixture(scope="module")
def tool() -> types.ModuleType:
    """Under another name: the lm-evaluation-harness imports a library called `evaluate`."""
    specification = importlib.util.spec_from_file_location("evaluate_tool", TOOL)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model folder with a byte tokenizer, and beside it a corpus."""
    config = small_config(vocab_size=VOCABULARY, window=16, num_layers=2, pattern="GL")
    with ModelFolderWriter(tmp_path / "model", config) as writer:
        for name, parameter in make_model(config).named_parameters():
            writer.write(name, parameter)
        writer.add_file("tokenizer.json", serialize(byte_tokenizer()))
    random = np.random.default_rng(0)
    with CorpusWriter(tmp_path / "held_out", vocab_size=VOCABULARY) as corpus:
        corpus.add_documents([random.integers(0, VOCABULARY, length) for length in (500, 90, 300)])
    return tmp_path / "model"


def on_two_ranks(port: int, *arguments: str) -> list[str]:
    """What the ranks print; without a launcher, which would import torch once more."""
    layout = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        subprocess.Popen(
            [sys.executable, *arguments], env=environment() | layout | {"RANK": rank, "LOCAL_RANK": rank}, cwd=ROOT,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )
        for rank in "01"
    ]  # fmt: skip
    outputs = [finish(process) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    return outputs


def test_the_same_numbers_alone_and_on_two_ranks(model: Path) -> None:
    arguments = [
        TOOL, str(model), "--tasks", "positions,contexts,passkey", "--lengths", "200", "--contexts", "8,64",
        "--final", "16", "--depths", "0,100%", "--samples", "2", "--data", str(model.parent / "held_out"),
    ]  # fmt: skip
    alone = run_alone(*arguments, "--output", str(model.parent / "alone"))
    assert alone.returncode == 0, alone.stderr
    assert "wrote " in alone.stdout
    rows, about = load_results(model.parent / "alone" / "evaluation.json")
    assert about["layout"] == "dp 1 x cp 1 x tp 1"
    assert about["tokenizer"] == str(model / "tokenizer.json")
    assert {row.task for row in rows} == {"positions", "contexts", "passkey"}
    assert about["pictures"] == ["positions.png", "contexts.png", "passkey.png"]
    assert {path.name for path in (model.parent / "alone").iterdir()} == {
        "evaluation.json", "positions.png", "contexts.png", "passkey.png",
    }  # fmt: skip

    arguments += ["--output", str(model.parent / "shared"), "--parallel.context=2"]
    outputs = on_two_ranks(29617, *arguments)
    assert outputs[0].count("exact match") == 1
    assert outputs[1] == "", "rank 0 speaks"
    shared, about = load_results(model.parent / "shared" / "evaluation.json")
    assert about["layout"] == "dp 1 x cp 2 x tp 1"
    for row, other in zip(shared, rows, strict=True):
        assert (row.task, row.tokens, row.exact_match) == (other.task, other.tokens, other.exact_match)
        assert row.loss == pytest.approx(other.loss, abs=1e-5)  # float32, losses of size 6


def test_options_become_a_plan(model: Path, tool: types.ModuleType) -> None:
    arguments = [
        str(model), "--tasks", "copy,ruler", "--lengths", "900,2k,1M", "--depths", "0,12.5%,100", "--output", "out",
        "--local_rank=3", "--parallel.tensor=2", "--seed", "7",
    ]  # fmt: skip
    options, overrides = tool.parse_arguments(arguments)
    assert overrides == ["parallel.tensor=2"]
    weights = open_weights(model)
    config = tool.configuration(weights.model, overrides, options.lengths, "fp32")
    assert config.model == weights.model
    assert (config.parallel.tensor, config.data.seq_len, config.train.precision) == (2, 64, "fp32")
    plan, about = tool.make_plan(options, weights)
    assert (plan.lengths, plan.depths, plan.seed) == ([900, 2048, 2**20], [0, 0.125, 1], 7)
    assert plan.encoder is not None
    assert about["tokenizer"] == str(model / "tokenizer.json")


@pytest.mark.parametrize(
    "override", ["model.window=8", "model.rope.theta=5", "data.seq_len=9", "train.precision=fp32", "config=run.yaml"]
)
def test_keys_that_would_change_the_model_are_refused(tool: types.ModuleType, override: str) -> None:
    with pytest.raises(UserError, match=rf"--{override} has no place in an evaluation.*; leave it out"):
        tool.parse_arguments(["model", "--output", "out", "--parallel.tensor=2", f"--{override}"])
    _, overrides = tool.parse_arguments(["model", "--output", "out", "--train.attention_backend", "blocked"])
    assert overrides == ["train.attention_backend=blocked"]


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--buckets", "0", "0 is less than 1"),
        ("--buckets", "-1", "-1 is less than 1"),
        ("--seed", "-1", "-1 is negative; give 0 or more"),
        ("--samples", "0", "0 is less than 1"),
        ("--lengths", ",", "',' names nothing; give at least one"),
        ("--lengths", "0k", "0 is less than 1"),
        ("--contexts", ",", "',' names nothing; give at least one"),
        ("--depths", ",", "',' names nothing; give at least one"),
        ("--tasks", "", "'' names nothing; give at least one"),
    ],
)
def test_values_without_a_meaning_are_told(
    tool: types.ModuleType, capsys: pytest.CaptureFixture[str], option: str, value: str, message: str
) -> None:
    with pytest.raises(SystemExit):
        tool.parse_arguments(["model", "--output", "out", f"{option}={value}"])
    assert f"argument {option}: {message}" in capsys.readouterr().err


def test_bare_tokens_ask_for_no_tokenizer(model: Path, tool: types.ModuleType) -> None:
    arguments = [str(model), "--tasks", "copy,kv", "--lengths", "64", "--depths", "50", "--output", "out"]
    (model / "tokenizer.json").unlink()
    checksums = json.loads((model / "checksums.json").read_text())
    del checksums["files"]["tokenizer.json"]
    (model / "checksums.json").write_text(json.dumps(checksums))
    weights = open_weights(model)
    options, _ = tool.parse_arguments(arguments)
    with pytest.raises(UserError, match=r"brings no tokenizer.*; or ask with bare token ids \(--bare-tokens\)"):
        tool.make_plan(options, weights)
    options, _ = tool.parse_arguments([*arguments, "--bare-tokens"])
    plan, about = tool.make_plan(options, weights)
    assert about["questions"] == "bare tokens"
    assert [(cell.example(0).tokens < 8).any() for cell in plan.cells()] == [True, True]


def test_a_tokenizer_has_to_fit_the_model(model: Path, tool: types.ModuleType) -> None:
    larger = train_byte_level_bpe(["a larger vocabulary than the model has, larger, larger"] * 3, 280)
    (model.parent / "tokenizer.json").write_bytes(serialize(larger))
    arguments = [str(model), "--tasks", "kv", "--output", "out", "--tokenizer", str(model.parent)]
    options, _ = tool.parse_arguments(arguments)
    with pytest.raises(UserError, match=r"tokenizer\.json has 2\d\d tokens, model\.vocab_size is 257"):
        tool.make_plan(options, open_weights(model))
