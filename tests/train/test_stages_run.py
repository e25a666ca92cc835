"""A run of stages: what changes from one to the next, what is carried over, and stopping anywhere in it."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.distributed import run_distributed

from megazebra.checkpoint.reader import TrainingCheckpoint
from megazebra.config import Config
from megazebra.config.stages import stages_of
from megazebra.data.corpus.corpus_writer import CorpusWriter
from megazebra.errors import UserError
from megazebra.launch import complete_environment
from megazebra.train.deepspeed_config import build_deepspeed_config
from megazebra.train.loop import train
from megazebra.train.metrics import read_metrics
from megazebra.train.session import World, open_session, stages_left

SHORT, LONG, LAST = 4, 3, 3  # steps
STRETCHED = {
    "pattern": "GLLL",
    "max_position_embeddings": 64,
    "rope_global": {"scaling": "linear", "factor": 2.0},
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    random = np.random.default_rng(0)
    for name in ("train", "validation"):
        with CorpusWriter(folder / name, vocab_size=61) as writer:
            for length in random.integers(20, 150, 60):
                writer.add_document(random.integers(0, 61, length).tolist())
    return folder


def run_config(corpus: Path, run_dir: Path, **checkpoint: Any) -> Config:
    return Config.model_validate(
        {
            "run": {"dir": str(run_dir)},
            "model": {
                "num_layers": 4, "hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 4, "vocab_size": 61,
                "max_position_embeddings": 32, "pattern": "G", "window": 8,
            },
            "data": {
                "path": str(corpus / "train"), "validation_path": str(corpus / "validation"), "seq_len": 32,
            },
            "validation": {"samples": 4},
            "evaluation": {"tasks": ["positions", "copy"], "samples": 3, "depths": [1.0]},
            "train": {"precision": "fp32", "global_batch_size": 4, "steps": SHORT},
            "optimizer": {"lr": 1e-2},
            "checkpoint": {"interval": 1, "keep_last": 100, **checkpoint},
            "stages": {
                "short": {},
                "long": {
                    "model": STRETCHED, "data": {"seq_len": 64}, "train": {"steps": LONG}, "optimizer": {"lr": 5e-3},
                },
                "last": {
                    "model": STRETCHED, "data": {"seq_len": 64}, "train": {"steps": LAST, "global_batch_size": 2},
                    "parallel": {"context": 2, "zero_stage": 3}, "optimizer": {"state": "reset"},
                },
            },
        }
    )  # fmt: skip


def train_stages(configs: list[Config]) -> list[str]:
    """Each run from where it stands to its end, or what it says why not (called on every rank)."""
    complete_environment()
    world, outcomes = World(), []
    for config in configs:
        try:
            for stage in stages_left(stages_of(config), world):
                with open_session(config, stage, world, build_deepspeed_config(stage.config, 2, None)) as session:
                    train(session)
            outcomes.append("done")
        except UserError as error:
            outcomes.append(str(error))
    return outcomes


@pytest.fixture(scope="module")
def whole(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Undisturbed, with a checkpoint of every step."""
    config = run_config(corpus, tmp_path_factory.mktemp("whole"))
    assert run_distributed(train_stages, 2, [config]) == [["done"], ["done"]]
    return config


def rows_of(config: Config, kind: str) -> list[dict[str, Any]]:
    return [row for row in read_metrics(Path(config.run.dir) / "metrics.jsonl") if row["kind"] == kind]


def stopped_after(step: int, config: Config, folder: Path, **changes: Any) -> Config:
    """The run as it was when it had made the checkpoint of `step`."""
    shutil.copytree(config.run.dir, folder)
    for path in (folder / "checkpoints").glob("step_*"):
        if int(path.name.removeprefix("step_")) > step:
            shutil.rmtree(path)
    (folder / "checkpoints" / "latest").write_text(f"step_{step:08d}\n")
    tree = config.model_dump() | {"run": {"dir": str(folder)}}
    for section, keys in changes.items():
        tree[section] = tree[section] | keys
    return Config.model_validate(tree)


def ask_before_training(config: Config) -> tuple[int, int | None]:
    """The stage that is gone on with, and the signal that ended it (called on every rank; rank 1 gets the signal)."""
    complete_environment()
    world = World()
    stage = stages_left(stages_of(config), world)[0]
    with open_session(config, stage, world, build_deepspeed_config(stage.config, 2, None)) as session:
        if session.mesh.world.rank == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        return stage.number, train(session)


def test_a_stop_request_between_stages_is_heard_before_the_next_step(whole: Config, tmp_path: Path) -> None:
    config = stopped_after(SHORT, whole, tmp_path / "run")
    assert run_distributed(ask_before_training, 2, config) == [(1, signal.SIGUSR1)] * 2
    assert [row["step"] for row in rows_of(config, "train")] == list(range(1, SHORT + 1))


def test_metrics_tell_the_stages_apart(whole: Config) -> None:
    rows = rows_of(whole, "train")
    assert [row["step"] for row in rows] == list(range(1, SHORT + LONG + LAST + 1))
    assert [row["stage"] for row in rows] == ["short"] * SHORT + ["long"] * LONG + ["last"] * LAST
    tokens = np.diff([0, *(row["tokens"] for row in rows)]).tolist()
    assert tokens == [4 * 32] * SHORT + [4 * 64] * LONG + [2 * 64] * LAST
    # Each stage's schedule begins anew, from its own peak: warmup is 0, so the first step is nearest to it.
    assert rows[SHORT]["lr"] < rows[0]["lr"] < 1e-2 < 2 * rows[SHORT]["lr"] * 1.5
    stages = rows_of(whole, "stage")
    assert [(row["name"], row["number"], row["step"]) for row in stages] == [
        ("short", 1, 0), ("long", 2, SHORT), ("last", 3, SHORT + LONG),
    ]  # fmt: skip
    assert stages[1]["config"]["model.pattern"] == "GLLL"
    # Before a stage's first update, its conditions are tried on the weights of the one before.
    validated = [(row["step"], row["stage"]) for row in rows_of(whole, "validation")]
    assert validated == [
        (SHORT, "short"), (SHORT, "long"), (SHORT + LONG, "long"), (SHORT + LONG, "last"),
        (SHORT + LONG + LAST, "last"),
    ]  # fmt: skip


def test_tasks_are_evaluated_at_the_length_of_each_stage(whole: Config) -> None:
    """Also through ZeRO-3 and context parallelism, which the last stage has."""
    rows = rows_of(whole, "evaluation")
    copies = [(row["step"], row["stage"], row["length"]) for row in rows if row["task"] == "copy"]
    assert copies == [
        (SHORT, "short", 32), (SHORT, "long", 64), (SHORT + LONG, "long", 64), (SHORT + LONG, "last", 64),
        (SHORT + LONG + LAST, "last", 64),
    ]  # fmt: skip
    assert {row["end"] for row in rows if row["task"] == "positions" and row["stage"] == "short"} == {16, 32}
    before, after = (
        [row["loss"] for row in rows if row["step"] == SHORT + LONG and row["stage"] == stage]
        for stage in ("long", "last")
    )
    # The same weights, pattern and length under another layout.
    assert before == pytest.approx(after, abs=1e-5)


def test_moments_are_carried_or_reset(whole: Config) -> None:
    def updates(step: int) -> float:
        checkpoint = TrainingCheckpoint.open(Path(whole.run.dir) / "checkpoints" / f"step_{step:08d}")
        return checkpoint.scalars("model.norm.weight")["step"]

    assert [updates(step) for step in range(1, SHORT + LONG + LAST + 1)] == [*range(1, SHORT + LONG + 1), 1, 2, 3]


def test_stopping_anywhere_changes_nothing(whole: Config, tmp_path: Path) -> None:
    """In the middle of a stage, and exactly between two of them."""
    stops = (SHORT - 1, SHORT, SHORT + LONG + 1)
    configs = [stopped_after(step, whole, tmp_path / str(step)) for step in stops]
    assert run_distributed(train_stages, 2, configs) == [["done"] * len(configs)] * 2
    for config in configs:
        for kind, fields in (("train", ("step", "stage", "tokens", "loss", "grad_norm", "lr")),
                             ("validation", ("step", "stage", "loss")), ("stage", ("step", "name"))):  # fmt: skip
            expected, found = rows_of(whole, kind), rows_of(config, kind)
            assert [[row[f] for f in fields] for row in found] == [[row[f] for f in fields] for row in expected], kind


def test_what_cannot_go_on_says_so(whole: Config, corpus: Path, tmp_path: Path) -> None:
    damaged = stopped_after(SHORT + 1, whole, tmp_path / "damaged", checkpoint={"on_damage": "go_back"})
    for name in (f"step_{SHORT:08d}", f"step_{SHORT + 1:08d}"):  # back into the stage before
        file = next((tmp_path / "damaged" / "checkpoints" / name).glob("*.safetensors"))
        file.write_bytes(file.read_bytes()[:-1])
    longer = stopped_after(SHORT + 1, whole, tmp_path / "longer", train={"steps": SHORT + 1})
    renamed = stopped_after(SHORT + 1, whole, tmp_path / "renamed")
    renamed = renamed.model_copy(update={"stages": {"first": {}, "second": renamed.stages["long"]}})
    # The second attempt is the same command again.
    (outcomes, _) = run_distributed(train_stages, 2, [damaged, damaged, longer, renamed])
    assert f"step {SHORT - 1}, in stage short: stage long (2 of 3) begins after step {SHORT}" in outcomes[0]
    assert outcomes[1] == "done"
    assert [row["loss"] for row in rows_of(damaged, "train")] == [row["loss"] for row in rows_of(whole, "train")]
    assert f"stage long began after step {SHORT} there, after {SHORT + 1} here" in outcomes[2]
    assert "is in stage 'long', number 2; this run has the stages 'first', 'second'" in outcomes[3]
