"""The lm-evaluation-harness offline: our plugin against the harness's own `hf` model on the exported weights.

Runs where lm_eval is installed (extra `eval`), which the development environment is not asked to bring.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from models.zebras import make_model, small_config
from support.command_line import ROOT, environment

from megazebra.checkpoint.model_folder import ModelFolderWriter
from megazebra.data.prepare.encoders.tokenizer import EOD_TOKEN, byte_tokenizer, serialize
from megazebra.hf.exporting import HuggingFaceExport

needs_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm_eval is not installed; pip install -e '.[eval]'"
)
TASKS = ("zebra_choices", "zebra_rolling", "zebra_generation")
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


def save_model(folder: Path) -> None:
    """Random weights over bytes, with windows that the longest questions exceed, and a context that they do too."""
    config = small_config(vocab_size=257, window=7, max_position_embeddings=96)
    with ModelFolderWriter(folder, config) as writer:
        for name, parameter in make_model(config).named_parameters():
            writer.write(name, parameter)
        writer.add_file("tokenizer.json", serialize(byte_tokenizer()))
        about = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOD_TOKEN}
        writer.add_file("tokenizer_config.json", json.dumps(about).encode())
        writer.add_file("generation_config.json", json.dumps({"bos_token_id": 256, "eos_token_id": 256}).encode())


def harness(folder: Path, module: str, model: str, arguments: str) -> dict[str, list[dict[str, Any]]]:
    """What it logs for every sample of every task."""
    run = subprocess.run(
        [
            sys.executable, "-m", module, "--model", model, "--model_args", arguments, "--tasks",
            ",".join(TASKS), "--include_path", "tests/evaluate/harness_tasks", "--device", "cpu", "--batch_size", "4",
            "--output_path", str(folder), "--log_samples",
        ],
        env=environment(HF_HOME=str(folder), **OFFLINE), cwd=ROOT, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    logged = {}
    for task in TASKS:
        (path,) = folder.rglob(f"samples_{task}_*.jsonl")
        samples = map(json.loads, path.read_text().splitlines())
        logged[task] = sorted(samples, key=lambda sample: sample["doc_id"])
    return logged


@needs_lm_eval
def test_the_plugin_and_the_export_score_the_same(tmp_path: Path) -> None:
    save_model(tmp_path / "model")
    HuggingFaceExport(tmp_path / "model").write(tmp_path / "hf")
    ours = harness(
        tmp_path / "a", "megazebra.evaluate.harness", "megazebra", f"path={tmp_path / 'model'},dtype=float32"
    )
    theirs = harness(tmp_path / "b", "lm_eval", "hf", f"pretrained={tmp_path / 'hf'},dtype=float32")
    assert {task: len(samples) for task, samples in ours.items()} == dict.fromkeys(TASKS, 8)
    for task in ("zebra_choices", "zebra_rolling"):
        for sample, other in zip(ours[task], theirs[task], strict=True):
            assert sample["arguments"] == other["arguments"]
            for response, expected in zip(sample["resps"], other["resps"], strict=True):
                likelihood, *greedy = response[0] if isinstance(response[0], list) else response
                wanted, *wanted_greedy = expected[0] if isinstance(expected[0], list) else expected
                # Sums of up to 100 losses of size 5, in float32 on both sides.
                assert float(likelihood) == pytest.approx(float(wanted), abs=1e-2, rel=1e-5)
                assert greedy == wanted_greedy
    assert [sample["acc"] for sample in ours["zebra_choices"]] == [sample["acc"] for sample in theirs["zebra_choices"]]
    texts, wanted = ([sample["resps"] for sample in side["zebra_generation"]] for side in (ours, theirs))
    assert texts == wanted
    assert any(response for row in texts for response in row[0]), "something was generated"
