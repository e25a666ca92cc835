"""The results of tools/evaluate.py on the page: its pictures and its rows, and whatever else the file holds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megazebra.config.keys import flat
from megazebra.durable import is_file_name
from megazebra.errors import UserError
from megazebra.report import html
from megazebra.report.html import Html

FILE = "evaluation.json"
LEGEND = "columns"
PICTURES = "pictures"


@dataclass(frozen=True)
class Evaluation:
    """content: of evaluation.json. pictures: the .png files beside it that it names, by name; where it says nothing of
    pictures, all of them."""

    path: Path
    content: dict[str, Any]
    pictures: dict[str, bytes]

    @classmethod
    def open(cls, given: Path) -> Evaluation:
        """given: the file, or its folder. Raises UserError where there is none."""
        path = given / FILE if given.is_dir() else given
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(content, dict):
                raise ValueError("no JSON object")
        except (OSError, ValueError, RecursionError) as error:
            mend = "give the output folder of tools/evaluate.py"
            raise UserError(f"{path} is no evaluation ({error}); {mend}") from error
        files = sorted(path.parent.glob("*.png"))
        if isinstance(named := content.get(PICTURES), list):
            files = [path.parent / name for name in named if is_file_name(name)]
        pictures = {file.stem: file.read_bytes() for file in files if file.suffix == ".png" and file.is_file()}
        return cls(path, content, pictures)

    def shown(self) -> Html:
        """Lists of objects as tables, the pictures, then all single values."""
        about: dict[str, Any] = {}
        tables = []
        for name, value in self.content.items():
            if name in (LEGEND, PICTURES):
                continue
            if isinstance(value, list) and value and all(isinstance(row, dict) for row in value):
                tables += [row_table(group) for group in alike(value)]
            else:
                about |= flat({name: value})
        pictures = [html.picture(png, name) for name, png in self.pictures.items()]
        legend = self.content.get(LEGEND)
        return html.joined(
            [
                html.element("div", *pictures, class_="charts") if pictures else "",
                *tables,
                html.details("What the columns mean", html.facts(legend)) if isinstance(legend, dict) else "",
                html.details("What was evaluated, and how", html.facts(about)),
            ]
        )


def alike(rows: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The rows, those that fill the same columns together."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(name for name, value in row.items() if value is not None), []).append(row)
    return list(groups.values())


def row_table(rows: Sequence[dict[str, Any]]) -> Html:
    """Rows as a table of all columns that one of them fills."""
    columns = list(dict.fromkeys(name for row in rows for name, value in row.items() if value is not None))
    return html.table(
        [name.replace("_", " ") for name in columns], ([row.get(name) for name in columns] for row in rows)
    )
