"""tools/repeat.py: the first steps of a real run again, by the program that users start."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import repeat
from support.distributed import run_distributed
from support.training import tiny_config

from megazebra.config import Config
from megazebra.config.stages import stages_of
from megazebra.data.corpus.corpus_writer import CorpusWriter
from megazebra.errors import UserError
from megazebra.launch import complete_environment
from megazebra.train.deepspeed_config import build_deepspeed_config
from megazebra.train.loop import train
from megazebra.train.session import World, open_session, stages_left


def train_each(configs: list[Config]) -> None:
    complete_environment()
    world = World()
    for config in configs:
        for stage in stages_left(stages_of(config), world):
            with open_session(config, stage, world, build_deepspeed_config(stage.config, 1, None)) as session:
                train(session)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two stages that begin with the weights of another run, and validate."""
    folder = tmp_path_factory.mktemp("repeat")
    random = np.random.default_rng(0)
    with CorpusWriter(folder / "text", vocab_size=61) as writer:
        writer.add_documents([random.integers(0, 61, 100) for _ in range(20)])
    origin = tiny_config(data__path=str(folder / "text"), train__steps=1, run__dir=str(folder / "origin"))
    tree = tiny_config(
        data__path=str(folder / "text"), data__validation_path=str(folder / "text"), run__dir=str(folder / "run"),
        checkpoint__init_from=str(folder / "origin"), checkpoint__interval=1, validation__interval=1,
        validation__samples=2,
    ).model_dump()  # fmt: skip
    # Of the second stage a rerun makes one step and is ended: the last one, which it would save, is far.
    stages = {"first": {"train": {"steps": 2}}, "second": {"train": {"steps": 20}, "model": {"window": 3}}}
    run_distributed(train_each, 1, [origin, Config.model_validate(tree | {"stages": stages})])
    return folder / "run"


@pytest.fixture
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}.items():
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("one_thread")
def test_the_same_numbers_again(original: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    repeat.main([str(original), "--steps", "3", "--run-dir", str(tmp_path)])
    output = capsys.readouterr().out
    assert "bit for bit: losses and gradient norms of 3 steps are the same numbers" in output, output
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert "validation" not in {row["kind"] for row in rows}
    checkpoints = {path.name for path in (tmp_path / "checkpoints").glob("step_????????")}
    assert checkpoints == {"step_00000002"}, "the second stage begins with it"


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_another_seed_is_found(original: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        repeat.main([str(original), "--steps", "1", "--train.seed=5"])
    output = capsys.readouterr().out
    assert end.value.code == 1
    assert "differs from step 1 on" in output
    assert "config.train.seed: 1234 then, 5 now" in output


def steps(*differences: tuple[float, float]) -> list[repeat.Step]:
    """Steps whose loss and gradient norm differ relatively by so much."""
    return [
        repeat.Step(number, (1.0, 1.0 - loss), (1.0, 1.0 - norm)) for number, (loss, norm) in enumerate(differences, 1)
    ]


@pytest.mark.parametrize(
    ("compared", "expected", "beyond"),
    [
        (steps((0, 0), (0, 0)), "bit for bit", False),
        (steps((0, 0), (2e-6, 5e-5)), "equal to rounding: .* 2.0e-06 of the loss (step 2) and 5.0e-05", False),
        (steps((0, 0), (0, 2e-4), (1, 1)), "differs from step 2 on", True),
        (steps((2e-5, 0)), "differs from step 1 on", True),
        ([repeat.Step(1, (None, None), (None, None))], "bit for bit", False),
        ([repeat.Step(1, (None, 3.0), (None, 1.0))], "differs from step 1 on", True),
    ],
)
def test_the_verdict(compared: list[repeat.Step], expected: str, beyond: bool) -> None:
    verdict = repeat.verdict(compared, 1e-5)
    assert all(part in verdict for part in expected.split(".*"))
    assert any(step.beyond(1e-5) for step in compared) == beyond


def write_run(folder: Path, starts: list[dict[str, Any]], steps: int) -> Path:
    rows = [{"kind": "train", "step": step, "loss": 1.0, "grad_norm": 1.0} for step in range(1, steps + 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if starts:
        (folder / "run.json").write_text(json.dumps(starts))
    return folder


def start(first_step: int, ranks: int = 2, **changes: Any) -> dict[str, Any]:
    hosts = {"a": {"ranks": list(range(ranks)), "devices": ["cpu"] * ranks}}
    return {"first_step": first_step, "hosts": hosts, "config": tiny_config(**changes).model_dump(mode="json")}


def test_only_steps_under_the_first_configuration_are_repeated(tmp_path: Path) -> None:
    starts = [
        start(0, optimizer__lr=1.0),  # a run that was begun anew
        start(0, ranks=4),
        start(3, parallel__tensor=2, logging__interval=7, validation__interval=2, checkpoint__keep_last=9),
        start(6, optimizer__lr=0.5),
    ]
    original = repeat.Original.open(write_run(tmp_path, starts, steps=9))
    assert len(original.rows) == 6
    assert original.config.optimizer.lr == 1e-2
    assert original.ranks == 4
    assert [each["first_step"] for each in original.resumed] == [3]


def test_what_cannot_be_repeated_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"metrics.jsonl does not exist; give the folder of a run"):
        repeat.main([str(tmp_path)])
    with pytest.raises(UserError, match="nothing to repeat"):
        repeat.main([str(write_run(tmp_path, [start(0)], steps=0))])
    (tmp_path / "run.json").unlink()
    (tmp_path / "config.yaml").write_text("train: {steps: 5}\ndata: {seq_len: 32}\n")
    with pytest.raises(UserError, match="give --ranks"):
        repeat.main([str(write_run(tmp_path, [], steps=2))])
    with pytest.raises(UserError, match=r"the rerun ended before step 2:\nno such program"):
        repeat.main([str(tmp_path), "--steps", "2", "--ranks", "1", "--launch", "echo no such program"])
