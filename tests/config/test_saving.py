"""save_config, and that load_config gives back what it wrote."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megazebra.config import (
    Config,
    DataConfig,
    LoggingConfig,
    ModelConfig,
    OptimizerConfig,
    RopeConfig,
    RunConfig,
    TrainConfig,
    WandbConfig,
    load_config,
    save_config,
)
from megazebra.config.keys import fields, value_of

POSITIVE = st.floats(min_value=0, exclude_min=True, allow_infinity=False)
# Surrogates are no characters; the rest of Unicode may stand in a path.
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20) | st.sampled_from(
    [
        "1e-3",
        "no",
        "null",
        "~",
        "true",
        "5",
        "0x1F",
        "1:30",
        "",
        " a ",
        "a: b",
        "# a",
        "a\n b\n\n",
        "2024-01-01",
        "<<",
        "\x85",
    ]
)


@st.composite
def configs(draw: st.DrawFn) -> Config:
    head_dim = 2 * draw(st.integers(1, 40))
    layers = draw(st.integers(1, 5))
    symbols = st.sampled_from(["G", "L"]) | st.integers(1, 10**6)
    pattern = draw(
        st.text("GL", min_size=1, max_size=layers) | st.lists(symbols, min_size=layers, max_size=layers).map(tuple)
    )
    factors = tuple(draw(st.lists(POSITIVE, min_size=head_dim // 2, max_size=head_dim // 2)))
    rope = draw(
        st.sampled_from(
            [
                RopeConfig(enabled=False),
                RopeConfig(scaling="abf", abf_theta=5e5),
                RopeConfig(scaling="yarn", factor=4, original_max_position_embeddings=4096, beta_fast=16),
                RopeConfig(
                    scaling="longrope",
                    factor=2,
                    original_max_position_embeddings=2048,
                    short_factor=factors,
                    long_factor=factors,
                ),
            ]
        )
    )
    return Config(
        run=RunConfig(dir=draw(TEXT)),
        model=ModelConfig(
            num_layers=layers,
            head_dim=head_dim,
            pattern=pattern,
            rope_global=rope,
            rms_norm_eps=draw(POSITIVE),
            final_logit_softcap=draw(st.none() | POSITIVE),
        ),
        train=TrainConfig(seed=draw(st.integers(0, 2**31 - 1))),
        optimizer=OptimizerConfig(lr=draw(POSITIVE), betas=(draw(st.floats(0, 0.99)), 0.5)),
        data=DataConfig(path=draw(st.none() | TEXT)),
        logging=LoggingConfig(wandb=WandbConfig(name=draw(st.none() | TEXT))),
    )


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(configs())
def test_load_gives_back_what_save_wrote(tmp_path: Path, config: Config) -> None:
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config


def test_every_key_is_written_with_its_documentation(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    save_config(load_config(None, ["model.num_layers=4", "model.pattern=[G, 64, 128, L]"]), path)
    text = path.read_text(encoding="utf-8")
    assert "  # Keys a query of a local layer sees, itself included.\n  window: 512\n" in text
    assert "  pattern: [G, 64, 128, L]\n" in text
    assert max(map(len, text.splitlines())) <= 120
    written = yaml.safe_load(text)
    for key in fields():
        place = written
        for name in key.split("."):
            place = place[name]
        value = value_of(load_config(path), key)
        # Read by PyYAML as it is: other readers see the same types.
        assert place == (list(value) if isinstance(value, tuple) else value), key


def test_the_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("old")
    save_config(Config(), path)
    assert load_config(path) == Config()
    assert [file.name for file in tmp_path.iterdir()] == ["config.yaml"]
    with pytest.raises(FileNotFoundError):
        save_config(Config(), tmp_path / "missing" / "config.yaml")


def test_a_failing_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("old")

    def full_disk(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match=r"No space left on device: .*config.yaml"):
        save_config(Config(), path)
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["config.yaml"]
