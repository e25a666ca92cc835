"""The experiments of tools/experiments: how they begin and go on, and (slow) that they show what they say."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

EXPERIMENTS = Path(__file__).parents[2] / "tools" / "experiments"


def load(name: str) -> types.ModuleType:
    specification = importlib.util.spec_from_file_location(name, EXPERIMENTS / f"{name}.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("name", "paths"),
    [("lcat_tiny", ("work", "data", "llama")), ("lit_tiny", ("work", "json")), ("passkey_tiny", ("work",))],
)
def test_paths_are_those_of_the_caller(
    name: str, paths: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    module = load(name)
    options = module.parse_arguments([f"--{path}=here/{path}" for path in paths])
    assert [getattr(options, path) for path in paths] == [tmp_path / "here" / path for path in paths]
    defaults = module.parse_arguments([])
    assert all(getattr(defaults, path) is None or tmp_path in getattr(defaults, path).parents for path in paths)


def test_a_stopped_conversion_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lcat = load("lcat_tiny")
    folders = ["merged", "llama-hf", "imported"]
    for there in range(len(folders) + 1):
        work = tmp_path / str(there)
        for folder in folders[:there]:
            (work / folder).mkdir(parents=True)
        commands: list[tuple[Any, ...]] = []
        monkeypatch.setattr(lcat, "run", lambda *command, into=commands: into.append(command))
        assert lcat.convert(tmp_path / "llama", work) == work / "imported"
        made = [[part.name for part in command if isinstance(part, Path)][-1] for command in commands]
        assert made == folders[there:]


def run(name: str, work: Path, *arguments: str) -> dict[str, Any]:
    subprocess.run([sys.executable, str(EXPERIMENTS / f"{name}.py"), "--work", str(work), *arguments], check=True)
    return json.loads((work / f"{name.removesuffix('_tiny')}.json").read_text())


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_global_layer_finds_the_passkey_and_windows_do_not(tmp_path: Path) -> None:
    results = run("passkey_tiny", tmp_path)
    shares = {pattern: found["tokens"] for pattern, found in results["patterns"].items()}
    assert min(shares["GGGG"], shares["GLLL"]) > 0.85
    # 768 tokens: four standard deviations of a guess are 3.6 %.
    assert shares["LLLL"] < results["chance_of_a_token"] + 0.04


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_adapted_models_keep_short_texts_and_read_long_ones(tmp_path: Path) -> None:
    results = run("lcat_tiny", tmp_path, "--data", str(tmp_path / "data"))

    def halves(losses: list[float]) -> tuple[float, float]:
        """Mean loss within the Llama's length, and beyond it."""
        return sum(losses[:4]) / 4, sum(losses[4:]) / len(losses[4:])

    within, beyond = halves(results["llama"]["losses"])
    assert beyond > within + 0.5, "the Llama falls apart beyond its length"
    for kind, adapted in results["adapted"].items():
        assert adapted["short"] < 1.02 * results["llama"]["short"], kind
        adapted_within, adapted_beyond = halves(adapted["losses"])
        assert adapted_beyond < adapted_within, kind
        assert adapted_beyond < beyond - 0.5, kind
