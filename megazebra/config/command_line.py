"""The command line of the training program: a file, overrides, and what the DeepSpeed launcher adds."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megazebra.config.errors import ConfigError
from megazebra.config.help import help_text

_ONCE = ("--config", "--deepspeed_config", "--stage")
_IGNORED = ("--local_rank", "--local-rank")  # the launcher adds it; the rank is read from the environment


@dataclass(frozen=True)
class CommandLine:
    """What was asked for; `overrides` are `section.key=value` for `load_config`, `stage` is the one a tool looks at."""

    config_path: Path | None = None
    deepspeed_config_path: Path | None = None
    overrides: list[str] = field(default_factory=list)
    stage: str | None = None


def parse_command_line(argv: Sequence[str]) -> CommandLine:
    """Take the arguments after the program's name apart; keys and values are checked by `load_config`.

    -h and --help print every key and exit. Raises ConfigError for an option without a value, a file given
    twice, and arguments that are no options.
    """
    once: dict[str, str] = {}
    overrides: list[str] = []
    problems: list[str] = []
    rest = list(argv)
    while rest:
        argument = rest.pop(0)
        if argument in ("-h", "--help"):
            print(help_text())
            sys.exit(0)
        if argument == "--deepspeed":  # DeepSpeed's own habit; training always goes through it
            continue
        name, equals, value = argument.partition("=")
        if not name.startswith("--") or name == "--":
            problems.append(
                f"command line {argument!r}: is no option; write --section.key=value, --config FILE "
                "or --deepspeed_config FILE"
            )
            continue
        if not equals and rest and not rest[0].startswith("--"):
            value = rest.pop(0)
        if not value.strip():
            problems.append(f"command line {name}: has no value; write {name}=VALUE")
        elif name in _ONCE:
            if name in once:
                problems.append(f"command line {name}={value}: {name} is given twice; keep one")
            once[name] = value
        elif name not in _IGNORED:
            overrides.append(f"{name[2:]}={value}")
    if problems:
        raise ConfigError(problems)
    config, deepspeed_config = (Path(once[name]) if name in once else None for name in _ONCE[:2])
    return CommandLine(config, deepspeed_config, overrides, once.get("--stage"))
