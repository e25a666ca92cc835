"""Checkpoints laid out anew: what a run of that layout would have written, and all that each of its ranks reads."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from support.checkpoints import STEPS, Truth
from support.distributed import run_distributed
from support.training import CPU, make_engine, run_steps, tiny_config
from torch import Tensor

from megazebra.checkpoint import reshard
from megazebra.checkpoint.fragments import owned_pieces
from megazebra.checkpoint.manager import Checkpoints, Progress
from megazebra.checkpoint.reader import TrainingCheckpoint
from megazebra.checkpoint.reshard import Reshard
from megazebra.checkpoint.store import CheckpointError, read_index
from megazebra.config.schema import Config
from megazebra.parallel.mesh import ParallelMesh
from megazebra.train.engine import start_deepspeed

Runs = dict[str, tuple[Config, Truth]]


def reshard_run(run_dir: str | Path, output: Path, tensor: int, data: int, stage: int, max_file_bytes: int) -> Path:
    resharding = Reshard(TrainingCheckpoint.open(run_dir), output, tensor, data, stage)
    written: list[int] = []
    resharding.write(max_file_bytes, written.append)
    assert sum(written) == resharding.total_bytes()
    return resharding.folder


def tensors_in(folder: Path) -> dict[str, Tensor]:
    """Every tensor under its rank and key, in whichever of the rank's files it lies."""
    return {
        f"{path.name[:14]} {key}": value
        for path in folder.glob("*.safetensors")
        for key, value in load_file(path).items()
    }


# Blocks of any size must give the same: 509 divides nothing here.
@pytest.mark.parametrize("block", [509, reshard.BLOCK_ELEMENTS])
def test_there_and_back_every_rank_has_what_it_wrote(
    run: tuple[Config, Truth], block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reshard, "BLOCK_ELEMENTS", block)
    run_dir = run[0].run.dir
    original = TrainingCheckpoint.open(run_dir)
    layout = original.layout
    reshard_run(run_dir, tmp_path / "there", 4 // layout["tensor"], 3, 3 - layout["zero_stage"], 20_000)
    back = reshard_run(
        tmp_path / "there", tmp_path / "back", layout["tensor"], layout["data"] * layout["context"],
        layout["zero_stage"], 10**9,
    )  # fmt: skip
    here, there = tensors_in(original.folder), tensors_in(back)
    assert here.keys() == there.keys()
    for key, values in here.items():
        assert values.dtype == there[key].dtype
        assert values.equal(there[key]), key
    before, after = read_index(original.folder), read_index(back)
    assert before.keys() == after.keys()
    for key in before.keys() - {"files", "layout"}:
        assert before[key] == after[key], key
    for name, entry in before["files"].items():
        assert entry["pieces"] == after["files"][name]["pieces"]
        assert entry["tensor_rank"] == after["files"][name]["tensor_rank"]


def test_files_are_of_bounded_size_and_whole(runs: Runs, tmp_path: Path) -> None:
    config, truth = runs["tp2-cp2-zero2"]
    limit = 20_000
    folder = reshard_run(config.run.dir, tmp_path / "new", 4, 3, 1, limit)
    checkpoint = TrainingCheckpoint.open(tmp_path / "new")
    checkpoint.verify()
    assert checkpoint.layout == {"tensor": 4, "data": 3, "context": 1, "zero_stage": 1}
    assert {name[:13] for name in checkpoint.files} == {f"tp_{t:03d}_dp_{d:03d}" for t in range(4) for d in range(3)}
    assert len(checkpoint.files) > 12
    for name, entry in read_index(folder)["files"].items():
        tensors = load_file(folder / name)
        assert sum(values.nbytes for values in tensors.values()) <= limit or len(entry["pieces"]) == 1
    for name, states in truth.states.items():
        assert checkpoint.scalars(name) == {"step": STEPS}
        for what, expected in states.items():
            assert checkpoint.tensor(name, what).equal(expected), (name, what)


# Layouts to resume under: tensor, context, ZeRO stage; of 4 ranks, the others are data-parallel.
RESUMED = {"dp4-zero3": (1, 1, 3), "tp2-cp2-zero1": (2, 2, 1)}


def config_for(original: Config, run_dir: Path, layout: str) -> Config:
    tensor, context, stage = RESUMED[layout]
    return tiny_config(
        run__dir=str(run_dir), train__precision=original.train.precision, parallel__tensor=tensor,
        parallel__context=context, parallel__zero_stage=stage, parallel__sequence_parallel=tensor > 1,
    )  # fmt: skip


def keep_own_files(config: Config) -> Config:
    """The same run, in a folder of this rank that has nobody else's files."""
    mesh = ParallelMesh.build(config.parallel)
    own = Path(f"{config.run.dir}-of-tp{mesh.tp.rank}-dp{mesh.dp_cp.rank}")
    shutil.copytree(config.run.dir, own, copy_function=os.link)
    kept = f"tp_{mesh.tp.rank:03d}_dp_{mesh.dp_cp.rank:03d}_"
    paths = list(own.rglob("*.safetensors"))
    for path in paths:
        if not path.name.startswith(kept):
            path.unlink()
    assert 0 < len(list(own.rglob("*.safetensors"))) < len(paths)
    return config.model_copy(update={"run": config.run.model_copy(update={"dir": str(own)})})


def resume_both(pairs: list[tuple[Config, Config]]) -> list[tuple[Any, Any]]:
    """Losses of the next steps, and this rank's whole state after them, from the original and from own files only."""
    start_deepspeed(CPU, timeout_s=60)
    return [(resume(original), resume(keep_own_files(resharded))) for original, resharded in pairs]


def resume(config: Config) -> tuple[list[float], dict[str, Tensor]]:
    engine = make_engine(config)
    assert Checkpoints(config, engine, {}).resume() == Progress(STEPS, STEPS * 4, STEPS * 128)
    losses, _ = run_steps(engine, config, range(STEPS, STEPS + 1))
    state = {
        piece.key(what): piece.view(values).clone() if values.numel() > 1 else values.clone()
        for piece in owned_pieces(engine)
        for what, values in {"master": piece.buffer, **engine.optimizer.state[piece.buffer]}.items()
    }
    engine.deepspeed.destroy()
    return losses, state


def test_resumes_bit_for_bit_and_every_rank_opens_its_own_files_only(runs: Runs, tmp_path: Path) -> None:
    original = runs["tp2-dp2-zero3"][0]
    pairs = []
    for layout, (tensor, _, stage) in RESUMED.items():
        reshard_run(original.run.dir, tmp_path / layout, tensor, 4 // tensor, stage, 30_000)
        pairs.append(
            (config_for(original, Path(original.run.dir), layout), config_for(original, tmp_path / layout, layout))
        )
    for rank, found in enumerate(run_distributed(resume_both, 4, pairs)):
        for layout, ((losses, state), (again, same)) in zip(RESUMED, found, strict=True):
            assert losses == again, (layout, rank)
            assert state.keys() == same.keys()
            for key, values in state.items():
                assert values.equal(same[key]), (layout, rank, key)


def test_what_cannot_be_laid_out_is_refused(sharded: Path, tmp_path: Path) -> None:
    checkpoint = TrainingCheckpoint.open(sharded)
    with pytest.raises(CheckpointError, match=r"parallel\.tensor .*num_kv_heads"):
        Reshard(checkpoint, tmp_path / "new", tensor=8, data=1)
    with pytest.raises(CheckpointError, match="data=0 must be at least one rank"):
        Reshard(checkpoint, tmp_path / "new", tensor=1, data=0)
    resharding = Reshard(checkpoint, tmp_path / "new", tensor=1, data=2)
    path = sharded / "tp_001_dp_001_00.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{path.name} is damaged"):
        resharding.write()
    assert not list(tmp_path.rglob("new/**/*.*")), "nothing half-written is left"
    (tmp_path / "new" / "checkpoints" / "latest").write_text("step_00000001")
    with pytest.raises(CheckpointError, match="checkpoints/latest exists"):
        resharding.write()


def test_bf16_without_zero_is_laid_out_for_stage_1(sharded: Path, tmp_path: Path) -> None:
    assert Reshard(TrainingCheckpoint.open(sharded), tmp_path, 1, 2, zero_stage=0).layout["zero_stage"] == 1
