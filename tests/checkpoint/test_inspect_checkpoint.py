"""tools/inspect_checkpoint.py from its command line."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import inspect_checkpoint
import pytest
import torch
from support.checkpoints import STEPS, Truth
from support.command_line import ROOT, environment, run_alone

from megazebra.checkpoint.model_folder import ModelFolder, ModelFolderWriter
from megazebra.checkpoint.reader import TrainingCheckpoint
from megazebra.checkpoint.store import CheckpointError
from megazebra.config.schema import Config

TOOL = str(ROOT / "tools" / "inspect_checkpoint.py")
CHANGED = "model.layers.3.mlp.gate_proj.weight"


@pytest.fixture
def folders(sharded: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A checkpoint as a model folder in bfloat16, and the same with one weight changed and one left out."""
    checkpoint = TrainingCheckpoint.open(sharded)
    for kind in ("same", "changed"):
        with ModelFolderWriter(tmp_path / kind, checkpoint.config.model, dtype=torch.bfloat16) as writer:
            for name in checkpoint.names:
                weight = checkpoint.tensor(name)
                if kind == "changed" and name == CHANGED:
                    weight = 2 * weight
                if kind == "same" or name != "lm_head.weight":
                    writer.write(name, weight)
    return tmp_path / "same", tmp_path / "changed"


Output = pytest.CaptureFixture[str]


def lines_of(output: Output, *arguments: object, code: int = 0) -> list[str]:
    assert inspect_checkpoint.main([str(argument) for argument in arguments]) == code
    return output.readouterr().out.splitlines()


def test_tree_of_a_training_checkpoint(runs: dict[str, tuple[Config, Truth]], capsys: Output) -> None:
    config, truth = runs["tp2-dp2-zero3"]
    lines = lines_of(capsys, config.run.dir, "--with-optimizer")
    assert lines[0] == f"{config.run.dir}/checkpoints/step_{STEPS:08d}"
    assert f"  progress    step {STEPS}, {4 * STEPS} samples, {128 * STEPS} tokens" in lines
    assert "  layout      tp 2 x cp 1 x dp 2, ZeRO-3" in lines
    assert "  training    adamw, bf16" in lines
    assert f"  parameters  {sum(weight.numel() for weight in truth.weights.values()):,}" in lines
    start = lines.index("    3")
    assert lines[start - 1].startswith("        down_proj.weight "), "of layer 2"
    assert lines[start + 2] == "      self_attn"
    found = re.fullmatch(
        r"        k_proj\.weight +\[32, 64\]  float32  norm (\S+) +exp_avg (\S+) +exp_avg_sq (\S+)", lines[start + 4]
    )
    assert found, lines[start + 4]
    states = truth.states["model.layers.3.self_attn.k_proj.weight"]
    for shown, expected in zip(found.groups(), states.values(), strict=True):
        assert float(shown) == pytest.approx(expected.double().norm().item(), rel=1e-4)


def test_tree_of_a_model_folder_without_reading_it(folders: tuple[Path, Path], capsys: Output) -> None:
    (file,) = folders[0].glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    lines = lines_of(capsys, folders[0], "--dry-run")
    assert any(re.fullmatch(r"  embed_tokens\.weight +\[61, 64\]  bfloat16", line) for line in lines)
    assert not any("norm " in line for line in lines)
    with pytest.raises(CheckpointError, match=f"{file} is damaged"):
        inspect_checkpoint.main([str(folders[0])])


def test_diff_names_what_differs(sharded: Path, folders: tuple[Path, Path], capsys: Output) -> None:
    same, changed = folders
    equal = lines_of(capsys, sharded, "--diff", same)
    assert equal[-1] == f"all {len(ModelFolder.open(same).names)} weights are equal"
    different = lines_of(capsys, same, "--diff", changed, code=1)
    assert different[2:] == [
        f"{CHANGED}: relative norm of the difference 1.00e+00",
        "lm_head.weight: only in the first",
        "2 of 39 weights differ",
    ]


def test_messages_and_closed_pipes(sharded: Path, tmp_path: Path, capsys: Output) -> None:
    with pytest.raises(SystemExit):
        inspect_checkpoint.main(["a", "--diff", "b", "--with-optimizer"])
    assert "leave out --with-optimizer" in capsys.readouterr().err
    run = run_alone(TOOL, str(tmp_path / "nothing"))
    assert run.returncode == 2
    assert run.stderr.startswith(f"error: {tmp_path}/nothing is no training checkpoint")
    closed = subprocess.run(
        ["sh", "-c", f"{sys.executable} {TOOL} {sharded} | head -1"], env=environment(), cwd=ROOT, capture_output=True,
        text=True, timeout=120,
    )  # fmt: skip
    assert closed.stdout == f"{sharded}\n"
    assert "Broken" not in closed.stderr
