"""Hardware profiles: those that come along, and messages about a user's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from megazebra.config import ConfigError
from megazebra.plan.hardware import peak_flops
from megazebra.plan.profile import load_profile, profile_names


def test_profiles_that_come_along() -> None:
    assert profile_names() == ["a100", "cpu", "h100"]
    for name, device in (("a100", "NVIDIA A100-SXM4-80GB"), ("h100", "NVIDIA H100 80GB HBM3")):
        assert load_profile(name).peak_flops("bf16") == peak_flops(device, "bf16")
    assert load_profile("cpu").usable_bytes < load_profile("cpu").memory_bytes


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    text = (Path(__file__).parents[2] / "megazebra" / "plan" / "profiles" / "h100.yaml").read_text()
    path.write_text(text.replace("devices_per_node: 8", "devices_per_node: 4"))
    assert load_profile(str(path)) == load_profile("h100").model_copy(update={"devices_per_node": 4})


def test_everything_wrong_is_told_at_once(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    text = (Path(__file__).parents[2] / "megazebra" / "plan" / "profiles" / "h100.yaml").read_text()
    text = text.replace("latency_s", "latencys").replace("matmul_share: 0.514", "matmul_share: 1.5")
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_profile(str(path))
    message = str(caught.value)
    assert "latency_s is missing: Seconds that a collective costs" in message
    assert "unknown key 'latencys'; did you mean 'latency_s'?" in message
    assert "matmul_share=1.5: must be a number > 0 and <= 1" in message
    line = next(n for n, line in enumerate(text.splitlines(), 1) if line.startswith("matmul_share"))
    assert f"{path}:{line}: matmul_share" in message


@pytest.mark.parametrize(("name", "message"), [("h1000", "did you mean 'h100'"), ("none.yaml", "cannot be read")])
def test_no_such_profile(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_profile(name)
