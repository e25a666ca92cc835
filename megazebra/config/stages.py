"""Stages: what follows what in a run whose lengths, windows or data change on the way.

Every stage is a whole configuration: the run's, with some keys set anew.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from megazebra.config import keys
from megazebra.config.errors import ConfigError
from megazebra.config.schema import Config

SECTIONS = ("model", "parallel", "train", "optimizer", "schedule", "data", "validation", "evaluation")
# These give the weights their shapes: all stages share the weights, so they share these.
SHAPES = tuple(
    f"model.{name}"
    for name in (
        *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_kv_heads", "head_dim"),
        *("vocab_size", "attention_sinks", "qk_norm", "attention_bias", "mlp_bias", "tie_word_embeddings"),
    )
)
MAX_SEED = 2**31
_NAME = re.compile(r"[A-Za-z0-9_-]+")


@dataclass(frozen=True)
class Stage:
    """One stage of a run, whose configuration has no stages any more.

    name: '' in a run without stages. number: from 0. first_step: updates made before it. last_step: updates made when
    it is complete. count: stages of the run. total_steps: updates of the whole run.
    """

    name: str
    number: int
    count: int
    config: Config
    first_step: int
    total_steps: int

    @property
    def last_step(self) -> int:
        return self.first_step + self.config.train.steps

    def describe(self) -> str:
        """'stage long (2 of 3)'."""
        return f"stage {self.name} ({self.number + 1} of {self.count})"


def stages_of(config: Config) -> tuple[Stage, ...]:
    """The stages of a run in their order; a run without any is one stage."""
    configs = [_stage_config(config, number, own) for number, own in enumerate(config.stages.values())]
    names = list(config.stages)
    if not configs:
        configs, names = [config], [""]
    total = sum(stage.train.steps for stage in configs)
    stages: list[Stage] = []
    for number, (name, own) in enumerate(zip(names, configs, strict=True)):
        first_step = stages[-1].last_step if stages else 0
        stages.append(Stage(name, number, len(configs), own, first_step, total))
    return tuple(stages)


def one_stage(config: Config, name: str | None) -> Config:
    """The configuration of the stage that a tool was asked for.

    Raises ConfigError when there is none of that name, or several and none was asked for.
    """
    stages = {stage.name: stage.config for stage in stages_of(config)}
    if name is None and len(stages) > 1:
        raise ConfigError([f"the run has the stages {', '.join(stages)}; choose one with --stage"])
    if name is not None and name not in stages:
        has = f"has the stages {', '.join(stages)}" if config.stages else "has no stages"
        raise ConfigError([f"command line --stage={name}: the run {has}{keys.did_you_mean(name, stages)}"])
    return next(iter(stages.values())) if name is None else stages[name]


def split_key(key: str) -> tuple[str, str] | None:
    """stages.long.train.steps as ('long', 'train.steps'); None for keys outside stages."""
    parts = key.split(".", 2)
    return (parts[1], parts[2]) if len(parts) == 3 and parts[0] == "stages" else None


def is_section(key: str) -> bool:
    """Whether a mapping under this key holds keys: a section, the stages, one of them, or a section of one."""
    parts = key.split(".", 2)
    if parts[0] != "stages":
        return keys.is_section(key)
    return len(parts) < 3 or keys.is_section(parts[2])


def objection(key: str) -> str | None:
    """Why a stage may not set a key that exists; None where it may."""
    if key in SHAPES:
        return "gives the weights their shape, and all stages share the weights; set it outside the stages"
    if key.partition(".")[0] not in SECTIONS:
        return "belongs to the whole run; set it outside the stages"
    return None


def problems_between(config: Config) -> Iterator[str]:
    """What does not fit from one stage to the next."""
    stages = stages_of(config)
    for before, stage in pairwise(stages):
        if stage.config.optimizer.name != before.config.optimizer.name and stage.config.optimizer.state == "carry":
            yield (
                f"stage {stage.name}: optimizer.name={stage.config.optimizer.name}: follows "
                f"{before.config.optimizer.name}, whose moments it cannot take; set optimizer.state=reset in this stage"
            )
        if _layers_with_sinks(before.config) != _layers_with_sinks(stage.config):
            yield (
                f"stage {stage.name}: model.pattern gives other layers attention sinks than stage {before.name} has, "
                f"under model.attention_sinks={config.model.attention_sinks}; keep these layers, or set "
                "model.attention_sinks to all or none"
            )
    window, steps = config.profile.window, stages[-1].last_step
    if window is not None and window[1] > steps:
        yield f"profile.steps={config.profile.steps}: the run has only {steps} steps; choose a window within them"
    for name in config.stages:
        if not _NAME.fullmatch(name):
            yield f"stages: has the name {name!r}; take letters, digits, '_' and '-'"


def _layers_with_sinks(config: Config) -> list[bool]:
    return [spec.sinks for spec in config.model.attention_specs()]


def _stage_config(config: Config, number: int, own: Mapping[str, Any]) -> Config:
    tree = config.model_dump(exclude={"stages"})
    tree["train"]["seed"] = (config.train.seed + number) % MAX_SEED
    for key, value in leaves(own):
        *path, name = key.split(".")
        section = tree
        for part in path:
            section = section[part]
        section[name] = value
    return Config.model_validate(tree)


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The keys that sections in `tree` give values to, dotted."""
    for name, value in tree.items():
        key = keys.join(prefix, name)
        if keys.is_section(key) and isinstance(value, Mapping):
            yield from leaves(value, key)
        else:
            yield key, value
