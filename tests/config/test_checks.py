"""Checks that span keys: each refuses what it should, in words that name the mend, and nothing else."""

from __future__ import annotations

import pytest

from megazebra.config import Config, ConfigError, ParallelConfig, TrainConfig, check_world, load_config
from megazebra.config.backends import attention_backend_names

YARN = ["scaling=yarn", "factor=4", "original_max_position_embeddings=2048"]
LLAMA3 = ["scaling=llama3", "factor=8", "original_max_position_embeddings=8192"]
LONGROPE = ["scaling=longrope", "factor=2", "original_max_position_embeddings=2048"]
TWO = "[1.0, 2.0]"


def rope(*options: str, kind: str = "rope_global") -> list[str]:
    return [f"model.{kind}.{option}" for option in options]


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.head_dim=64", "model.hidden_size=100"],
        ["model.num_kv_heads=8", "parallel.tensor=8"],
        # Odd heads are fine where no layer has RoPE: also when only the kind of layer that the pattern lacks has it.
        ["model.head_dim=7", *rope("enabled=false"), *rope("enabled=false", kind="rope_local")],
        ["model.head_dim=7", *rope("enabled=false"), "model.pattern=G"],
        ["model.head_dim=7", *rope("enabled=false", kind="rope_local"), "model.pattern=L"],
        ["model.num_layers=6", "model.pattern=GLLL"],
        ["model.num_layers=2", "model.pattern=[G, 7]"],
        rope("scaling=linear", "factor=2"),
        rope("scaling=ntk", "factor=2"),
        rope("scaling=abf", "abf_theta=5e5"),
        rope(*YARN, "beta_fast=16", "attention_factor=1.2"),
        rope(*LLAMA3, "low_freq_factor=2"),
        ["model.head_dim=4", *rope(*LONGROPE, f"short_factor={TWO}", f"long_factor={TWO}")],
        [
            "model.head_dim=4",
            *rope(*LONGROPE, "factor=1", f"short_factor={TWO}", f"long_factor={TWO}", kind="rope_local"),
        ],
        rope("enabled=false", *YARN),  # switching RoPE off for a try takes one key
        ["model.max_position_embeddings=8192", *rope(*YARN)],
        [
            "model.max_position_embeddings=8000",
            *rope("scaling=yarn", "factor=2.66666", "original_max_position_embeddings=3000"),  # 8000/3000, rounded
        ],
        # Nothing need reach the end of the sequence where no layer looks so far, or has a position embedding.
        ["model.max_position_embeddings=9000", "model.pattern=L", *rope(*YARN)],
        ["model.max_position_embeddings=9000", *rope(*YARN, "enabled=false")],
        ["model.max_position_embeddings=9000", *rope(*YARN, kind="rope_local")],
        ["model.max_position_embeddings=131072", *rope(*LLAMA3)],  # Llama 3.1
        ["parallel.sequence_parallel=true", "parallel.tensor=2"],
        ["parallel.sequence_parallel=true", "parallel.tensor=4", "data.seq_len=1023"],  # padded inside
        ["parallel.context=3", "data.seq_len=1000"],
        ["parallel.context=8", "parallel.context_local=halo", "parallel.context_global=ulysses", "parallel.tensor=4"],
        ["train.micro_batch_size=4", "train.global_batch_size=12"],
        ["train.hang_timeout_s=30", "parallel.timeout_s=60"],
        ["train.hang_timeout_s=0", "parallel.timeout_s=60"],
        ["parallel.timeout_s=60"],
        ["schedule.warmup_steps=10", "train.steps=10"],
        ["schedule.kind=wsd", "schedule.warmup_steps=4", "schedule.decay_steps=6", "train.steps=10"],
        ["schedule.kind=constant"],
        ["optimizer.name=sgd", "optimizer.momentum=0.9"],
        ["validation.interval=10", "data.validation_path=x"],
        *([f"train.attention_backend={name}"] for name in ("auto", "reference", "blocked", "flash", "flex")),
    ],
)
def test_accepted(overrides: list[str]) -> None:
    assert isinstance(load_config(None, overrides), Config)


@pytest.mark.parametrize(
    ("overrides", "problems"),
    [
        (
            ["model.hidden_size=100"],
            [
                "model.hidden_size=100: must be divisible by model.num_attention_heads=32 (next: 128), "
                "or set model.head_dim"
            ],
        ),
        (
            ["model.num_kv_heads=5"],
            ["model.num_kv_heads=5: must divide model.num_attention_heads=32: equal groups share a key/value head"],
        ),
        (
            ["model.head_dim=7"],
            [
                "model.head_dim=7: gives heads of 7 dimensions; RoPE needs an even number "
                "(or set model.rope_global.enabled=false)"
            ],
        ),
        (
            ["model.head_dim=7", *rope("enabled=false")],
            [
                "model.head_dim=7: gives heads of 7 dimensions; RoPE needs an even number "
                "(or set model.rope_local.enabled=false)"
            ],
        ),
        (
            ["model.num_layers=2", "model.pattern=GLLL"],
            [
                "model.pattern=GLLL: has 4 symbols but the model has num_layers=2; shorten the pattern "
                "or set num_layers >= 4"
            ],
        ),
        (
            ["model.pattern=GLX"],
            [
                "model.pattern=GLX: has 'X' at position 2; use 'G' (global) and 'L' (local), "
                "or in a list also an integer (a window of its own)"
            ],
        ),
        (
            ["parallel.tensor=3", "model.ffn_hidden_size=12"],
            [
                "default: model.num_attention_heads=32: must be divisible by parallel.tensor=3; lower parallel.tensor",
                "default: model.num_kv_heads=null: gives 32 key/value heads, not divisible by parallel.tensor=3; "
                "lower parallel.tensor or raise model.num_kv_heads",
            ],
        ),
        (
            ["parallel.tensor=4", "model.num_kv_heads=2"],
            [
                "model.num_kv_heads=2: gives 2 key/value heads, not divisible by parallel.tensor=4; "
                "lower parallel.tensor or raise model.num_kv_heads"
            ],
        ),
        (
            ["parallel.tensor=4", "model.ffn_hidden_size=13"],
            ["model.ffn_hidden_size=13: must be divisible by parallel.tensor=4 (next: 16); or lower parallel.tensor"],
        ),
        (
            ["parallel.context=3", "parallel.context_global=ulysses"],
            [
                "parallel.context_global=ulysses: needs parallel.context=3 to divide the 32 query heads of a "
                "tensor-parallel rank; set it to auto, or change parallel.context"
            ],
        ),
        (
            ["parallel.context_local=halo"],
            ["parallel.context_local=halo: is not read with parallel.context=1; remove it"],
        ),
        (
            ["data.seq_len=8192"],
            [
                "data.seq_len=8192: exceeds model.max_position_embeddings=4096; raise model.max_position_embeddings "
                "together with model.rope_global.scaling, or lower data.seq_len"
            ],
        ),
        (
            ["model.max_position_embeddings=10240", *rope(*YARN)],
            [
                "model.rope_global.factor=4: model.rope_global.factor=4.0: times "
                "model.rope_global.original_max_position_embeddings=2048 is 8192, "
                "less than model.max_position_embeddings=10240; set model.rope_global.factor=5 "
                "or lower model.max_position_embeddings"
            ],
        ),
        (
            ["model.head_dim=4", *rope(*LONGROPE, "factor=1", f"short_factor={TWO}", f"long_factor={TWO}")],
            [
                "model.rope_global.factor=1: model.rope_global.factor=1.0: times "
                "model.rope_global.original_max_position_embeddings=2048 is 2048, "
                "less than model.max_position_embeddings=4096; set model.rope_global.factor=2 "
                "or lower model.max_position_embeddings"
            ],
        ),
        (
            ["train.micro_batch_size=3"],
            ["default: train.global_batch_size=8: must be divisible by train.micro_batch_size=3 (next: 9)"],
        ),
        (
            ["train.hang_timeout_s=60", "parallel.timeout_s=60"],
            [
                "train.hang_timeout_s=60: train.hang_timeout_s=60.0: must be less than parallel.timeout_s=60, or "
                "collectives give up before; lower it, or raise parallel.timeout_s"
            ],
        ),
        (["schedule.warmup_steps=1001"], ["schedule.warmup_steps=1001: exceeds train.steps=1000"]),
        (
            ["schedule.kind=wsd", "schedule.decay_steps=900", "schedule.warmup_steps=101"],
            [
                "schedule.decay_steps=900: 900 decay steps after schedule.warmup_steps=101 exceed train.steps=1000; "
                "lower one of the two"
            ],
        ),
        (
            ["schedule.kind=wsd", "schedule.warmup_steps=901"],
            [
                "default: schedule.decay_steps=null: 100 decay steps after schedule.warmup_steps=901 exceed "
                "train.steps=1000; lower one of the two"
            ],
        ),
        (
            ["schedule.decay_steps=5"],
            ["schedule.decay_steps=5: is not read with kind=cosine, only with wsd; remove it"],
        ),
        (
            ["schedule.kind=constant", "schedule.min_lr_ratio=0.5"],
            ["schedule.min_lr_ratio=0.5: is not read with kind=constant, only with cosine | linear | wsd; remove it"],
        ),
        (
            ["optimizer.momentum=0.9"],
            ["optimizer.momentum=0.9: is not read with name=adamw, only with sgd; remove it"],
        ),
        (
            ["optimizer.name=sgd", "optimizer.betas=[0.9, 0.99]", "optimizer.eps=0.1"],
            [
                "optimizer.betas=[0.9, 0.99]: is not read with name=sgd, only with adamw; remove it",
                "optimizer.eps=0.1: is not read with name=sgd, only with adamw; remove it",
            ],
        ),
        (
            ["validation.interval=4"],
            [
                "validation.interval=4: needs a held-out corpus: set data.validation_path or data.validation_sources, "
                "or validation.interval=0"
            ],
        ),
    ],
)
def test_refused(overrides: list[str], problems: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, overrides)
    expected = [p if p.startswith("default") else f"command line --{p}" for p in problems]
    assert caught.value.problems == expected


@pytest.mark.parametrize("kind", ["rope_global", "rope_local"])
@pytest.mark.parametrize(
    ("options", "key", "words"),
    [
        (["scaling=linear"], "factor", "must be > 1 with scaling=linear"),
        (["scaling=ntk"], "factor", "must be > 1 with scaling=ntk"),
        (["scaling=yarn", "original_max_position_embeddings=9"], "factor", "must be > 1 with scaling=yarn"),
        (["scaling=llama3", "original_max_position_embeddings=9"], "factor", "must be > 1 with scaling=llama3"),
        (["scaling=yarn", "factor=2"], "original_max_position_embeddings", "is needed by scaling=yarn"),
        (["scaling=llama3", "factor=2"], "original_max_position_embeddings", "is needed by scaling=llama3"),
        (
            ["scaling=longrope", f"short_factor={TWO}", f"long_factor={TWO}"],
            "original_max_position_embeddings",
            "is needed by scaling=longrope",
        ),
        (["scaling=abf"], "abf_theta", "is needed by scaling=abf"),
        ([*LONGROPE, f"long_factor={TWO}"], "short_factor", "is needed by scaling=longrope"),
        ([*LONGROPE, f"short_factor={TWO}"], "long_factor", "is needed by scaling=longrope"),
        (
            [*LONGROPE, f"short_factor={TWO}", "long_factor=[1.0]"],
            "long_factor",
            "has 1 divisors; heads of 4 dimensions need 2",
        ),
        ([*YARN, "beta_slow=40"], "beta_slow", "must be < beta_fast=32"),
        ([*LLAMA3, "low_freq_factor=4"], "low_freq_factor", "must be < high_freq_factor=4"),
        (["factor=2"], "factor", "is not read with scaling=none, only with linear | ntk | yarn | llama3 | longrope"),
        (["scaling=abf", "abf_theta=9", "factor=2"], "factor", "is not read with scaling=abf"),
        (["abf_theta=9"], "abf_theta", "is not read with scaling=none, only with abf"),
        (["original_max_position_embeddings=9"], "original_max_position_embeddings", "is not read with scaling=none"),
        ([*LLAMA3, "beta_fast=9"], "beta_fast", "is not read with scaling=llama3, only with yarn"),
        ([*LLAMA3, "beta_slow=9"], "beta_slow", "is not read with scaling=llama3, only with yarn"),
        (
            [*LLAMA3, "attention_factor=2"],
            "attention_factor",
            "is not read with scaling=llama3, only with yarn | longrope",
        ),
        ([*YARN, "low_freq_factor=2"], "low_freq_factor", "is not read with scaling=yarn, only with llama3"),
        ([*YARN, "high_freq_factor=9"], "high_freq_factor", "is not read with scaling=yarn, only with llama3"),
        ([*YARN, f"short_factor={TWO}"], "short_factor", "is not read with scaling=yarn, only with longrope"),
        ([*YARN, f"long_factor={TWO}"], "long_factor", "is not read with scaling=yarn, only with longrope"),
    ],
)
def test_rope_options(options: list[str], key: str, words: str, kind: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, ["model.head_dim=4", *rope(*options, kind=kind)])
    (problem,) = caught.value.problems
    assert f"model.{kind}.{key}=" in problem
    assert words in problem


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [("flsh", "; did you mean 'flash'?"), ("packing", ""), ("backend", ""), ("inputs", ""), ("__init__", "")],
)
def test_unknown_attention_backend(name: str, suggestion: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, [f"train.attention_backend={name}"])
    (problem,) = caught.value.problems
    offered = problem.partition("must be one of ")[2].partition(";")[0].split(", ")
    assert offered == ["auto", *attention_backend_names()]
    assert {"reference", "blocked", "flash", "flex"} <= set(offered)
    assert name not in offered
    assert problem.endswith(suggestion)


def layout(batch: int = 8, micro: int = 1, tensor: int = 1) -> Config:
    return Config(
        train=TrainConfig(global_batch_size=batch, micro_batch_size=micro), parallel=ParallelConfig(tensor=tensor)
    )


@pytest.mark.parametrize(("config", "world"), [(layout(), 1), (layout(), 8), (layout(tensor=2), 8), (layout(12, 2), 3)])
def test_world_that_fits(config: Config, world: int) -> None:
    check_world(config, world)


@pytest.mark.parametrize(
    ("config", "world", "problem"),
    [
        (
            layout(tensor=2),
            3,
            "world size 3 is not divisible by parallel.tensor * parallel.context = 2; start 2 or 4 processes",
        ),
        (
            layout(tensor=4),
            2,
            "world size 2 is not divisible by parallel.tensor * parallel.context = 4; start 4 processes",
        ),
        (
            layout(),
            3,
            "train.global_batch_size=8 is not divisible by train.micro_batch_size=1 times 3 data-parallel ranks = 3; "
            "set train.global_batch_size to 6 or 9",
        ),
        (
            layout(4, 4, tensor=2),
            4,
            "train.global_batch_size=4 is not divisible by train.micro_batch_size=4 times 2 data-parallel ranks = 8; "
            "set train.global_batch_size to 8",
        ),
    ],
)
def test_world_that_does_not_fit(config: Config, world: int, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_world(config, world)
    assert caught.value.problems == [problem]
