"""tools/convert_hf.py from its command line; what it converts is tested in tests/hf."""

from __future__ import annotations

from pathlib import Path

import convert_hf
import pytest
import torch
from hf.hf_models import SIZES, load_theirs, logits, save_ours, save_theirs
from models.zebras import random_tokens, small_config
from support.command_line import ROOT, run_alone
from transformers import LlamaConfig

from megazebra.checkpoint.model_folder import ModelFolder
from megazebra.errors import UserError


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    save_theirs(LlamaConfig(**SIZES), tmp_path / "hf")
    return tmp_path / "hf"


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> list[str]:
    """The lines it prints."""
    convert_hf.main([str(argument) for argument in arguments])
    return capsys.readouterr().out.splitlines()


def test_a_dry_run_tells_all_and_writes_nothing(hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("import", hf, tmp_path / "model", "--pattern", "GLLL", "--window", 5, "--dry-run")
    lines = run(capsys, *arguments)
    # 61 and 61 rows of 32, a norm, and four layers of 32 x (32 + 16 + 16 + 32 + 3 x 40) and two norms; fp32.
    elements = 2 * 61 * 32 + 32 + 4 * (32 * (96 + 120) + 64)
    assert lines == [
        "from LlamaForCausalLM",
        "pattern GLLL over 4 layers, window 5",
        f"39 tensors, {4 * elements:,} bytes",
        "with generation_config.json",
        f"{tmp_path / 'model'} would be written; nothing was, and no checksum of weights was compared (--dry-run)",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    run(capsys, *arguments[:-1])
    assert "to CwmForCausalLM" in run(capsys, "export", tmp_path / "model", tmp_path / "back", "--dry-run")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "model"]


def test_there_and_back(hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, "import", hf, tmp_path / "model", "--dtype", "bfloat16", "--max-file-bytes", 10_000)
    model = ModelFolder.open(tmp_path / "model")
    assert {model.dtype(name) for name in model.names} == {torch.bfloat16}
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 2
    lines = run(capsys, "export", tmp_path / "model", tmp_path / "back", "--dtype", "float32", "--eos-token-id", 7)
    assert lines[-1] == f"wrote {tmp_path / 'back'}"
    theirs = load_theirs(tmp_path / "back")
    assert theirs.generation_config.eos_token_id == theirs.config.eos_token_id == 7
    tokens, _ = random_tokens(small_config(), 1, 20)
    # Weights of size 32^-0.5 rounded to 8 bits: logits of size one, sums of 32 such products over ten layers.
    torch.testing.assert_close(logits(theirs, tokens), logits(load_theirs(hf), tokens), rtol=0, atol=0.15)


def test_code_travels_where_it_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_ours(tmp_path / "model", attention_softcap=30.0)
    with pytest.raises(UserError, match=r"attention_softcap=30.0 .only null.; --remote-code exports it"):
        run(capsys, "export", tmp_path / "model", tmp_path / "hf")
    lines = run(capsys, "export", tmp_path / "model", tmp_path / "hf", "--remote-code")
    assert lines[0] == "to ZebraForCausalLM, which needs trust_remote_code=True"
    assert lines[3] == "with configuration_zebra.py, modeling_zebra.py"
    assert (tmp_path / "hf" / "modeling_zebra.py").exists()
    save_ours(tmp_path / "two-thetas", rope_global={"theta": 5e5})
    lines = run(capsys, "export", tmp_path / "two-thetas", tmp_path / "granite", "--remote-code", "--dry-run")
    assert lines[0] == "to GraniteSWAForCausalLM, which needs transformers 5.15 or newer"


def test_a_mistake_is_a_message(hf: Path, tmp_path: Path) -> None:
    run = run_alone(str(ROOT / "tools" / "convert_hf.py"), "import", str(hf), str(tmp_path / "model"), "--pattern=GLLL")
    assert run.returncode == 2
    assert run.stderr == (
        f"error: {hf / 'config.json'}: pattern 'GLLL' has local layers and the model has no window; give --window\n"
    )


def test_folders_that_are_wrong_are_named(hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=f"{hf} is no model folder"):
        run(capsys, "export", hf, tmp_path / "back")
    with pytest.raises(UserError, match=f"{hf} exists; choose another folder"):
        run(capsys, "import", hf, hf, "--dry-run")
