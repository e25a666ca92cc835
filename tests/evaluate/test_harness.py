"""The lm-evaluation-harness offline: our plugin against the harness's own `hf` model on the exported weights.

Runs where lm_eval is installed (extra `eval`), which the development environment is not asked to bring.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import types
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from models.zebras import make_model, small_config
from support.command_line import ROOT, environment

from megazebra.checkpoint.model_folder import ModelFolderWriter
from megazebra.data.prepare.encoders.tokenizer import EOD_TOKEN, byte_tokenizer, serialize
from megazebra.hf.exporting import HuggingFaceExport

PLUGIN = "megazebra.evaluate.harness"
INSTALLED = importlib.util.find_spec("lm_eval") is not None
needs_lm_eval = pytest.mark.skipif(not INSTALLED, reason="lm_eval is not installed; pip install -e '.[eval]'")
TASKS = ("zebra_choices", "zebra_rolling", "zebra_generation")
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """Our module; where lm_eval is not installed, over the few names of it that a model type is made with."""
    if INSTALLED:
        return importlib.import_module(PLUGIN)
    names: dict[str, dict[str, Any]] = {
        "lm_eval": {},
        "lm_eval.api": {},
        "lm_eval.api.model": {"TemplateLM": object},
        "lm_eval.api.registry": {"register_model": lambda name: lambda model_type: model_type},
        "lm_eval.utils": {"get_rolling_token_windows": None, "make_disjoint_window": None},
    }
    for name, content in names.items():
        module = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    found = importlib.import_module(PLUGIN)
    del sys.modules[PLUGIN]  # it is not what others would import
    return found


def save_model(folder: Path, **changes: Any) -> None:
    """Random weights over bytes, with windows that the longest questions exceed, and a context that they do too."""
    config = small_config(vocab_size=257, window=7, max_position_embeddings=96, **changes)
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


def test_repeats_of_a_prompt_draw_their_own_tokens(plugin: types.ModuleType, tmp_path: Path) -> None:
    save_model(tmp_path / "model")
    options = {"do_sample": True, "temperature": 3.0, "max_gen_toks": 8}
    requests = [SimpleNamespace(args=("the same", options)) for _ in range(5)]

    def texts(batch_tokens: int) -> list[str]:
        model = plugin.MegaZebraLM(str(tmp_path / "model"), device="cpu", batch_tokens=batch_tokens)
        return model.generate_until(requests)

    in_pairs = texts(2 * (len("the same") + 8))
    assert len(set(in_pairs)) == 5
    assert texts(1000) == in_pairs, "what is drawn does not depend on the batches"


def test_longrope_scores_a_text_alike_in_any_company(plugin: types.ModuleType, tmp_path: Path) -> None:
    original, divisors = 48, {"short_factor": (1.0,) * 4, "long_factor": (1.0, 2.0, 3.0, 4.0)}
    rope = {"scaling": "longrope", "factor": 2.0, "original_max_position_embeddings": original, **divisors}
    save_model(tmp_path / "model", rope_global=rope, rope_local=rope)
    model = plugin.MegaZebraLM(str(tmp_path / "model"), device="cpu")
    texts = [list(range(inputs + 1)) for inputs in (original - 8, original, original + 1, original + 12)]
    requests = [("", tokens[:-4], tokens[-4:]) for tokens in texts]
    assert [cell.length for cell in model._cells(requests)] == [original + 12, original]
    together = model._loglikelihood_tokens(requests)
    for request, (likelihood, greedy) in zip(requests, together, strict=True):
        ((alone, greedy_alone),) = model._loglikelihood_tokens([request])
        assert likelihood == pytest.approx(alone, abs=1e-4)  # float32, sums of size 20
        assert greedy == greedy_alone
