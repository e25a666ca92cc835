"""The experiments of tools/experiments show what they say: minutes each, so slow."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

EXPERIMENTS = Path(__file__).parents[2] / "tools" / "experiments"


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
