"""Stages: what a user writes, the configurations it comes to, and what is said when it is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from megazebra.config import Config, ConfigError, load_config, parse_command_line, save_config
from megazebra.config.stages import one_stage, stages_of

YAML = """\
model: {num_layers: 4, pattern: G, max_position_embeddings: 512}
data: {path: text, seq_len: 512}
train: {seed: 7, steps: 100}
stages:
  short:
  long:
    model:
      pattern: GLLL
      max_position_embeddings: 2048
      rope_global: {scaling: linear, factor: 4.0}
    data:
      seq_len: 2048
      path: null
      sources: {long: {path: text, weight: 1, min_document_tokens: 2048}, short: {path: text, weight: 3}}
    train: {steps: 20}
    optimizer: {state: reset}
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "run.yaml").write_text(YAML)
    return tmp_path / "run.yaml"


def test_each_stage_is_a_configuration_of_its_own(path: Path) -> None:
    config = load_config(path)
    short, long = stages_of(config)
    assert (short.name, short.first_step, short.last_step) == ("short", 0, 100)
    assert short.config == Config.model_validate(config.model_dump(exclude={"stages"})), "it sets nothing"
    assert (long.name, long.first_step, long.last_step, long.total_steps) == ("long", 100, 120, 120)
    assert long.describe() == "stage long (2 of 2)"
    assert long.config.model.pattern == "GLLL"
    assert long.config.model.rope_global.factor == 4.0
    assert long.config.data.path is None
    assert long.config.data.sources["long"].min_document_tokens == 2048
    assert long.config.optimizer.state == "reset"
    assert long.config.train.seed == 8, "a corpus is not read in the same order again"
    assert long.config.stages == short.config.stages == {}


def test_a_run_without_stages_is_one(path: Path) -> None:
    (stage,) = stages_of(Config())
    assert (stage.name, stage.config, stage.first_step, stage.last_step) == ("", Config(), 0, 1000)


def test_the_saved_configuration_is_the_same_run(path: Path, tmp_path: Path) -> None:
    config = load_config(path, ["stages.long.data.sources.short.weight=2"])
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config
    assert stages_of(config)[1].config.data.sources["short"].weight == 2


def test_the_command_line_reaches_into_a_stage(path: Path) -> None:
    overrides = ["stages.long.train.steps=5", "stages.long.train.seed=3", "stages.end={train: {steps: 1}}"]
    _, long, end = stages_of(load_config(path, overrides))
    assert (long.config.train.steps, long.config.train.seed) == (5, 3)
    assert (end.first_step, end.config.model.pattern, end.config.train.seed) == (105, "G", 9)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.long.model.hidden_size=64", r"model.hidden_size=64: gives the weights their shape"),
        ("stages.long.run.dir=x", "run.dir=x: belongs to the whole run; set it outside the stages"),
        ("stages.long.checkpoint.init_from=x", "checkpoint.init_from=x: belongs to the whole run"),
        (
            "stages.long.data.seq_len=4096",
            "stage long: .*data.seq_len=4096: exceeds model.max_position_embeddings=2048",
        ),
        ("stages.long.data.sqe_len=1", "stage long: .*unknown key 'data.sqe_len'; did you mean 'data.seq_len'?"),
        ("stages.long.train.steps=x", "stage long: .*must be a whole number >= 1"),
        ("stages.long=null", "stages: a stage can't be removed here; take it out of the file"),
        ("model.attention_sinks=local", "stage long: model.pattern gives other layers attention sinks"),
        ("stages.long=3", "must be a mapping of stages"),
        ("stages=3", "must be a mapping of stages"),
        ("stages.long.optimizer={name: sgd, state: carry}", "optimizer.name=sgd: follows adamw"),
        ("stages={a b: {train: {steps: 1}}}", "has the name 'a b'"),
    ],
)
def test_mistakes_name_the_stage_and_the_mend(path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(path, [override])


def test_nothing_asked_for_on_the_command_line_is_lost(path: Path) -> None:
    assert stages_of(load_config(path, ["train.steps=5"]))[0].config.train.steps == 5, "one stage takes it"
    with pytest.raises(
        ConfigError, match=r"every stage sets it anew; set --stages.short.data.seq_len and --stages.long"
    ):
        load_config(path, ["stages.short.data.seq_len=256", "data.seq_len=128"])
    sources = "{path: null, sources: {long: {path: text, weight: 1}}}"
    with pytest.raises(ConfigError, match=r"data.sources.long.weight=7: every stage sets it anew"):
        load_config(path, [f"stages.short.data={sources}", "data.sources.long.weight=7"])


def test_values_outside_need_not_fit_together(path: Path) -> None:
    """Where every stage is right, nobody runs what stands outside."""
    load_config(path, ["stages.short.model.max_position_embeddings=4096", "data.seq_len=4096"])
    with pytest.raises(ConfigError, match=r"data.seq_len=4096: exceeds model.max_position_embeddings=512"):
        load_config(None, ["data.seq_len=4096", "model.max_position_embeddings=512"])


def test_a_tool_looks_at_one_stage(path: Path) -> None:
    config = load_config(path)
    assert parse_command_line(["--stage", "long"]).stage == "long"
    assert one_stage(config, "long").data.seq_len == 2048
    assert one_stage(Config(), None) == Config()
    with pytest.raises(ConfigError, match="the run has the stages short, long; choose one with --stage"):
        one_stage(config, None)
    with pytest.raises(ConfigError, match=r"--stage=lang: the run has the stages short, long; did you mean 'long'?"):
        one_stage(config, "lang")
    with pytest.raises(ConfigError, match="the run has no stages"):
        one_stage(Config(), "long")
