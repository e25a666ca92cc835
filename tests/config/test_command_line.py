"""parse_command_line and --help."""

from __future__ import annotations

from pathlib import Path

import pytest

from megazebra.config import CommandLine, ConfigError, help_text, load_config, parse_command_line
from megazebra.config.keys import documentation, fields, sections


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], CommandLine()),
        (["--config", "a.yaml"], CommandLine(config_path=Path("a.yaml"))),
        (["--config=a.yaml"], CommandLine(config_path=Path("a.yaml"))),
        (["--deepspeed_config", "ds.json"], CommandLine(deepspeed_config_path=Path("ds.json"))),
        (["--deepspeed_config=ds.json"], CommandLine(deepspeed_config_path=Path("ds.json"))),
        (["--train.steps=20"], CommandLine(overrides=["train.steps=20"])),
        (["--train.steps", "20"], CommandLine(overrides=["train.steps=20"])),
        (["--optimizer.lr", "-1"], CommandLine(overrides=["optimizer.lr=-1"])),
        (["--run.dir=a=b c"], CommandLine(overrides=["run.dir=a=b c"])),
        (["--local_rank=3", "--local-rank=3", "--local_rank", "3", "--deepspeed"], CommandLine()),
        (
            ["--local_rank=0", "--deepspeed", "--config", "a.yaml", "--model.pattern=[G,L]", "--train.steps", "3"],
            CommandLine(config_path=Path("a.yaml"), overrides=["model.pattern=[G,L]", "train.steps=3"]),
        ),
    ],
)
def test_accepted(argv: list[str], expected: CommandLine) -> None:
    assert parse_command_line(argv) == expected


@pytest.mark.parametrize(
    ("argv", "problem"),
    [
        (["--train.steps"], "command line --train.steps: has no value; write --train.steps=VALUE"),
        (["--train.steps="], "command line --train.steps: has no value; write --train.steps=VALUE"),
        (["--train.steps", "--model.window=3"], "command line --train.steps: has no value; write --train.steps=VALUE"),
        (["--config"], "command line --config: has no value; write --config=VALUE"),
        (
            ["--config=a", "--config=b"],
            "command line --config=b: --config is given twice; keep one",
        ),
        (
            ["tiny.yaml"],
            "command line 'tiny.yaml': is no option; write --section.key=value, --config FILE "
            "or --deepspeed_config FILE",
        ),
        (
            ["-x"],
            "command line '-x': is no option; write --section.key=value, --config FILE or --deepspeed_config FILE",
        ),
    ],
)
def test_refused(argv: list[str], problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_command_line(argv)
    assert caught.value.problems == [problem]


def test_all_problems_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_command_line(["a", "b", "--config"])
    assert len(caught.value.problems) == 3


def test_both_spellings_load_the_same() -> None:
    equals = load_config(None, parse_command_line(["--train.steps=20", "--model.qk_norm=true"]).overrides)
    space = load_config(None, parse_command_line(["--train.steps", "20", "--model.qk_norm", "true"]).overrides)
    assert equals == space
    assert equals.train.steps == 20


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_exits_with_success(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse_command_line(["--train.steps", "5", flag])
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith("usage: ")


def test_help_shows_every_key_with_default_and_documentation() -> None:
    text = help_text(100)
    words = " ".join(text.split())
    for key in fields():
        assert f"--{key}=" in text
        assert documentation(key) in words
    assert "--train.precision=bf16  (fp32 | bf16)" in text
    assert "--optimizer.betas=[0.9, 0.95]  ([a number >= 0 and < 1, a number >= 0 and < 1])" in text
    assert "model.rope_global: Rotary embedding of global layers.\n" in text
    assert "Keys as in model.rope_global." in words
    assert all(name.split(".")[-1] in text for name in sections())


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_help_keeps_to_the_width(width: int) -> None:
    # What holds no space (a long key with its default) may stick out.
    body = help_text(width).partition("null.\n")[2].splitlines()
    assert all(len(line) <= width or " " not in line.strip() for line in body)


def test_every_key_is_documented() -> None:
    assert [key for key in fields() if not documentation(key)] == []
