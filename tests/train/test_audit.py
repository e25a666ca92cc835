"""run.json tells what each start of a run was made of."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.distributed import run_distributed
from support.training import tiny_config

from megazebra.config import Config
from megazebra.config.stages import stages_of
from megazebra.data.corpus.corpus_writer import CorpusWriter
from megazebra.data.sources import open_training_data
from megazebra.errors import UserError
from megazebra.launch import complete_environment
from megazebra.train.audit import FILE, append_start, git_state, read_starts, surroundings
from megazebra.train.deepspeed_config import build_deepspeed_config, user_additions
from megazebra.train.loop import train
from megazebra.train.session import World, open_session, stages_left


def train_each(configs: list[Config], deepspeed_file: Path | None) -> None:
    """One run after another on the same ranks (called on every rank)."""
    complete_environment()
    world = World()
    for config in configs:
        for stage in stages_left(stages_of(config), world):
            deepspeed = build_deepspeed_config(stage.config, 2, deepspeed_file)
            with open_session(config, stage, world, deepspeed) as session:
                train(session)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Two stages, of which the second was stopped after a step and resumed with more; two ranks."""
    folder = tmp_path_factory.mktemp("audit")
    random = np.random.default_rng(0)
    with CorpusWriter(folder / "text", vocab_size=61) as writer:
        writer.add_documents([random.integers(0, 61, 100) for _ in range(20)])
    (folder / "ds.json").write_text(json.dumps({"zero_optimization": {"overlap_comm": False, "stage": "auto"}}))

    def config(steps: int) -> Config:
        stages = {"first": {"train": {"steps": 2}}, "second": {"train": {"steps": steps}}}
        tree = tiny_config(data__path=str(folder / "text"), run__dir=str(folder / "run")).model_dump()
        return Config.model_validate(tree | {"stages": stages})

    run_distributed(train_each, 2, [config(1), config(2)], folder / "ds.json")
    return config(2)


def test_every_start_of_a_stage_is_recorded(run: Config) -> None:
    starts = read_starts(Path(run.run.dir))
    assert [(start["stage"], start["first_step"]) for start in starts] == [("first", 0), ("second", 2), ("second", 3)]
    assert [start["seed"] for start in starts] == [1234, 1235, 1235]
    assert Config.model_validate(starts[-1]["config"]) == run
    assert starts[0]["config"]["stages"]["second"]["train"]["steps"] == 1, "config.yaml has only the last start's"
    for start in starts:
        assert [host["ranks"] for host in start["hosts"].values()] == [[0, 1]]
        assert start["versions"].keys() >= {"python", "torch", "deepspeed", "megazebra", "numpy"}
        assert start["attention_backend"] in ("simd", "blocked")
        assert start["data"] == open_training_data(run).identity
        assert start["deepspeed_config"] == {"zero_optimization": {"overlap_comm": False}}


def test_the_users_settings_of_deepspeed_do_the_same_again(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    user: dict[str, Any] = {"steps_per_print": 5, "train_batch_size": 4, "comms_logger": {"enabled": True},
                            "zero_optimization": {"stage": "auto", "reduce_bucket_size": 10}}  # fmt: skip
    path.write_text(json.dumps(user))
    merged = build_deepspeed_config(tiny_config(), 2, path)
    additions = user_additions(tiny_config(), 2, merged)
    assert additions == {"steps_per_print": 5, "comms_logger": {"enabled": True},
                         "zero_optimization": {"reduce_bucket_size": 10}}  # fmt: skip
    path.write_text(json.dumps(additions))
    assert build_deepspeed_config(tiny_config(), 2, path) == merged


def test_secrets_are_not_written_down(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "NCCL_SECRET", "HF_TOKEN", "TORCH_HUB_TOKEN", "AWS_ACCESS_KEY_ID", "HOME_OF_MINE"):
        monkeypatch.setenv(name, "hidden")
    monkeypatch.setenv("NCCL_ALGO", "Ring")
    environment = surroundings()["environment"]
    assert environment["NCCL_ALGO"] == "Ring"
    assert "hidden" not in environment.values()


def test_what_is_not_committed_is_told_apart(tmp_path: Path) -> None:
    assert git_state(tmp_path) is None, "no checkout"

    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True)

    git("init")
    (tmp_path / "file").write_text("one\n")
    git("add", "file")
    git("commit", "-m", "first")
    clean = git_state(tmp_path)
    assert clean is not None
    assert (clean["dirty"], clean["diff_sha256"]) == (False, None)
    digests = set()
    for content in ("two\n", "three\n"):
        (tmp_path / "file").write_text(content)
        state = git_state(tmp_path)
        assert state is not None
        assert (state["commit"], state["dirty"]) == (clean["commit"], True)
        digests.add(state["diff_sha256"])
    assert len(digests) == 2


def test_a_damaged_record_is_put_aside(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text("[{")
    with pytest.raises(UserError, match=r"run\.json"):
        read_starts(tmp_path)
    append_start(tmp_path, {"first_step": 3})
    append_start(tmp_path, {"first_step": 5})
    assert [start["first_step"] for start in read_starts(tmp_path)] == [3, 5]
    assert (tmp_path / f"{FILE}.damaged").read_text() == "[{"
