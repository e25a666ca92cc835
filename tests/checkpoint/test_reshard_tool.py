"""tools/reshard_checkpoint.py on checkpoints of ours, from its command line, and in the memory of one weight."""

from __future__ import annotations

import weakref
from pathlib import Path

import pytest
import reshard_checkpoint
from support.checkpoints import STEPS, Truth
from support.command_line import ROOT, run_alone
from torch import Tensor

from megazebra.checkpoint.reader import TrainingCheckpoint
from megazebra.checkpoint.reshard import Reshard
from megazebra.checkpoint.store import CheckpointError
from megazebra.config.schema import Config
from megazebra.errors import UserError


def told(output: pytest.CaptureFixture[str], *arguments: object) -> list[str]:
    """The lines it prints."""
    reshard_checkpoint.main([str(argument) for argument in arguments])
    return output.readouterr().out.splitlines()


def test_a_dry_run_tells_all_and_writes_nothing(
    sharded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = (sharded, tmp_path / "new", "--tensor", 4, "--data", 2, "--zero-stage", 1)
    first, second, third = told(capsys, *arguments, "--dry-run")
    assert first == f"{sharded}: step {STEPS}, 39 weights, written by tp 2 x cp 1 x dp 2, ZeRO-3"
    assert second == f"  to {tmp_path}/new/checkpoints/step_{STEPS:08d}: tp 4 x 2 ranks, ZeRO-1"
    assert third.endswith("bytes would be written; nothing was, and no checksum was compared (--dry-run)")
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]

    *_, last = told(capsys, *arguments, "--max-file-bytes", 20_000)
    assert last == f"wrote {third.partition(' ')[0]} bytes"
    assert len(TrainingCheckpoint.open(tmp_path / "new").files) > 8
    with pytest.raises(CheckpointError, match=f"step_{STEPS:08d} exists; choose another folder"):
        told(capsys, *arguments)


def test_mistakes_are_messages(sharded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_alone(str(ROOT / "tools" / "reshard_checkpoint.py"), str(sharded), str(tmp_path / "new"), "--tensor=2")
    assert run.returncode == 2
    assert run.stderr == (
        f"error: {sharded} is a training checkpoint of ours; give the layout it gets: --tensor, --data\n"
    )
    layout = ("--tensor", 2, "--data", 1)
    for option in ("--with-optimizer", "--model.window=3", "--dtype=float16"):
        with pytest.raises(UserError, match=f"{option.partition('=')[0]}.* is not read: {sharded} is a training check"):
            told(capsys, sharded, tmp_path / "new", *layout, option)
    with pytest.raises(SystemExit):
        told(capsys, sharded, tmp_path / "new", *layout, "--tensr=4")
    assert "unrecognized arguments: --tensr=4" in capsys.readouterr().err


def test_one_whole_tensor_is_in_memory_at_a_time(
    runs: dict[str, tuple[Config, Truth]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
    read = []
    genuine = TrainingCheckpoint.tensor

    def watched(checkpoint: TrainingCheckpoint, name: str, what: str = "master") -> Tensor:
        assert not alive, "the one before is still there"
        whole = genuine(checkpoint, name, what)
        alive.add(whole)
        read.append((name, what))
        return whole

    monkeypatch.setattr(TrainingCheckpoint, "tensor", watched)
    config, truth = runs["tp2-dp2-zero3"]
    Reshard(TrainingCheckpoint.open(config.run.dir), tmp_path / "new", tensor=4, data=3).write()
    assert sorted(read) == sorted((name, what) for name, states in truth.states.items() for what in states)
