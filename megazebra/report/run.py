"""What a run folder holds, read as far as it goes: the page is made of runs that are under way or broken off, too."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megazebra.config import Config, ConfigError, load_config
from megazebra.config.keys import flat
from megazebra.errors import UserError

Row = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """rows: of metrics.jsonl (megazebra/train/metrics.py says what they mean), in their order. damaged: its lines that
    are no JSON objects. config: None where config.yaml is missing, or is one of another version (config_problem).
    checkpoints: index.json of each that is on the disk, by the folder's name.
    """

    folder: Path
    rows: list[Row]
    damaged: int
    config: Config | None
    config_problem: str
    checkpoints: dict[str, dict[str, Any]]
    latest: str

    @classmethod
    def open(cls, folder: Path) -> Run:
        """Raises UserError where the folder holds no metrics."""
        path = folder / "metrics.jsonl"
        try:
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror}); give the folder of a run (run.dir)") from error
        parsed = [_object(line) for line in lines if line.strip()]
        rows = [row for row in parsed if row is not None]
        config, problem = _config(folder / "config.yaml")
        latest = folder / "checkpoints" / "latest"
        return cls(
            folder=folder,
            rows=rows,
            damaged=len(parsed) - len(rows),
            config=config,
            config_problem=problem,
            checkpoints=_checkpoints(folder / "checkpoints"),
            latest=latest.read_text(errors="replace").strip() if latest.is_file() else "",
        )

    def of_kind(self, kind: str) -> list[Row]:
        return [row for row in self.rows if row.get("kind") == kind]

    def config_differences(self) -> dict[str, tuple[Any, Any]]:
        """Keys of the configuration that are not at their default: the default and what they are."""
        if self.config is None:
            return {}
        ours, defaults = (flat(config.model_dump(mode="json")) for config in (self.config, Config()))
        return {key: (defaults.get(key), value) for key, value in ours.items() if value != defaults.get(key)}


def _object(line: str) -> Row | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _config(path: Path) -> tuple[Config | None, str]:
    if not path.is_file():
        return None, f"{path.name} is not there"
    try:
        return load_config(path), ""
    except ConfigError as error:
        return None, str(error)


def _checkpoints(folder: Path) -> dict[str, dict[str, Any]]:
    found = {}
    for path in sorted(folder.glob("step_*/index.json")):
        try:
            index = _object(path.read_text(errors="replace"))
        except OSError:  # it may be deleted while we look: a newer one has replaced it
            continue
        found[path.parent.name] = index or {}
    return found
