"""The one exception of the configuration."""

from __future__ import annotations

from collections.abc import Sequence


class ConfigError(ValueError):
    """Everything that is wrong with a configuration, at once.

    problems: one line each, with its source, key, value and the mend.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__(list(problems))
        self.problems = list(problems)

    def __str__(self) -> str:
        if len(self.problems) == 1:
            return self.problems[0]
        return "\n".join([f"{len(self.problems)} problems in the configuration:", *(f"  {p}" for p in self.problems)])
