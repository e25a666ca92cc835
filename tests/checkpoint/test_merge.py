"""tools/merge_checkpoint.py: from pieces of any layout to model folders, in the memory of one weight."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import merge_checkpoint
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import STEPS, Truth
from support.command_line import ROOT, environment, run_alone
from support.training import tiny_config

from megazebra.checkpoint.merge import Merge
from megazebra.checkpoint.model_folder import ModelFolder
from megazebra.checkpoint.reader import TrainingCheckpoint
from megazebra.checkpoint.store import FORMAT_VERSION, CheckpointError, write_index
from megazebra.config.schema import Config
from megazebra.data.prepare.encoders.tokenizer import byte_tokenizer, serialize
from megazebra.durable import file_crc32

TOOL = str(ROOT / "tools" / "merge_checkpoint.py")


def test_folders_hold_the_weights_and_moments_of_the_run(run: tuple[Config, Truth], tmp_path: Path) -> None:
    config, truth = run
    precision = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    merge = Merge(TrainingCheckpoint.open(config.run.dir), tmp_path / "model", precision, with_optimizer=True)
    written: list[int] = []
    merge.write(100_000, written.append)
    assert sum(written) == merge.total_bytes()
    model = ModelFolder.open(tmp_path / "model")
    assert model.config == config.model
    assert set(model.names) == truth.weights.keys()
    for name, weight in truth.weights.items():
        assert model.tensor(name).equal(weight.to(precision)), name
    for state in ("master", "exp_avg", "exp_avg_sq"):
        folder = ModelFolder.open(tmp_path / f"model-{state}")
        assert set(folder.names) == truth.states.keys()
        for name, states in truth.states.items():
            assert folder.tensor(name).equal(states[state]), (name, state)
    training = json.loads((tmp_path / "model" / "training.json").read_text())
    assert training["step"] == STEPS
    assert training["optimizer"] == {name: {"step": STEPS} for name in truth.weights}
    assert len(list((tmp_path / "model-master").glob("*.safetensors"))) > 1, "files of at most 100,000 bytes"


def merge_told(output: pytest.CaptureFixture[str], *arguments: object) -> str:
    merge_checkpoint.main([str(argument) for argument in arguments])
    return output.readouterr().out


def test_the_tool_writes_weights_in_the_runs_precision_or_another(
    sharded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dry = merge_told(capsys, sharded, tmp_path / "dry", "--with-optimizer", "--dry-run")
    assert f"to {tmp_path}/dry-exp_avg_sq: exp_avg_sq in float32\n" in dry
    assert "nothing was" in dry
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]

    plain = merge_told(capsys, sharded, tmp_path / "plain")
    assert f"step {STEPS}, 39 weights in 4 files, written by tp 2 x cp 1 x dp 2, ZeRO-3\n" in plain
    merge_told(capsys, sharded, tmp_path / "exact", "--dtype", "float32")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy", "exact", "plain"]
    checkpoint = TrainingCheckpoint.open(sharded)
    for folder, dtype in (("plain", torch.bfloat16), ("exact", torch.float32)):
        model = ModelFolder.open(tmp_path / folder)
        for name in checkpoint.names:
            assert model.tensor(name).equal(checkpoint.tensor(name).to(dtype))

    with pytest.raises(CheckpointError, match=f"{tmp_path}/plain exists; choose another OUTPUT"):
        merge_told(capsys, sharded, tmp_path / "plain")


def test_the_tokenizer_comes_along(sharded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_bytes(serialize(byte_tokenizer()))
    without = merge_told(capsys, sharded, tmp_path / "without", "--dry-run")
    assert "  no tokenizer: no sidecar of the run's corpora (it has none) names one; --tokenizer PATH" in without
    told = merge_told(capsys, sharded, tmp_path / "model", "--with-optimizer", "--tokenizer", tokenizer)
    assert f"  tokenizer of {tokenizer}\n" in told
    assert (tmp_path / "model" / "tokenizer.json").read_bytes() == tokenizer.read_bytes()
    assert not (tmp_path / "model-master" / "tokenizer.json").exists()
    ModelFolder.open(tmp_path / "model").verify()


def damage(folder: Path) -> Path:
    path = folder / "tp_001_dp_000_00.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    return path


def test_of_a_damaged_checkpoint_nothing_is_merged(sharded: Path, tmp_path: Path) -> None:
    path = damage(sharded)
    run = run_alone(TOOL, str(sharded), str(tmp_path / "model"))
    assert run.returncode == 2
    assert run.stderr.startswith(f"error: {path} is damaged (its CRC-32 differs)")
    with pytest.raises(CheckpointError, match=f"{path} is damaged"):
        Merge(TrainingCheckpoint.open(sharded), tmp_path / "model", torch.float32, True).write(10**9)
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


ROWS, COLUMNS, WEIGHTS = 4096, 2048, 8
LARGEST = 4 * ROWS * COLUMNS  # bytes: 32 MiB of 256
MEASURED = """
import sys, merge_checkpoint, torch, megazebra.checkpoint.merge, megazebra.hf.run_tokenizer
def peak():
    return 1024 * int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
before = peak()
merge_checkpoint.main(sys.argv[1:])
print(peak() - before)
"""


@pytest.fixture
def large_checkpoint(tmp_path: Path) -> Path:
    """Weights split by columns over two ranks, each rank's shards over two more."""
    folder = tmp_path / "step_00000001"
    folder.mkdir()
    names = [f"model.layers.{layer}.mlp.down_proj.weight" for layer in range(WEIGHTS)]
    piece = ROWS * COLUMNS // 4
    for tp in range(2):
        for dp in range(2):
            values = torch.arange(piece, dtype=torch.float32) + piece * (2 * tp + dp)
            tensors = {f"{name}|{dp * piece}|master": values + number for number, name in enumerate(names)}
            save_file(tensors, folder / f"tp_{tp:03d}_dp_{dp:03d}.safetensors")
    index = {
        "format": FORMAT_VERSION,
        "config": tiny_config(train__precision="fp32").model_dump(mode="json"),
        "layout": {"data": 2, "context": 1, "tensor": 2, "zero_stage": 3},
        "progress": {"step": 1, "samples": 1, "tokens": 1},
        "parameters": {name: {"shape": [ROWS, COLUMNS], "partition_dim": 1} for name in names},
        "files": {
            path.name: {"bytes": path.stat().st_size, "crc32": file_crc32(path)}
            for path in folder.glob("*.safetensors")
        },
    }
    write_index(folder, index)
    return folder


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read from /proc")
def test_memory_is_that_of_the_largest_weight(large_checkpoint: Path, tmp_path: Path) -> None:
    grown = []
    for attempt in range(3):
        output = tmp_path / f"model{attempt}"
        process = subprocess.run(
            [sys.executable, "-c", MEASURED, str(large_checkpoint), str(output)],
            env=environment(PYTHONPATH=str(ROOT / "tools")), cwd=ROOT, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert process.returncode == 0, process.stderr
        grown.append(int(process.stdout.split()[-1]))
    # The constant: a block of the weight, two of the file that is verified, and code that is loaded on first use. What
    # malloc keeps of freed memory differs from run to run; it never makes a run look smaller.
    assert min(grown) < LARGEST + 4 * 2**24, grown
    (file,) = output.glob("*.safetensors")
    weight = load_file(file)[f"model.layers.{WEIGHTS - 1}.mlp.down_proj.weight"]
    shards = torch.arange(ROWS * COLUMNS, dtype=torch.float32).view(2, ROWS, COLUMNS // 2)
    rounded = (shards + (WEIGHTS - 1)).movedim(0, 1).reshape(ROWS, COLUMNS)
    assert weight.equal(rounded)
