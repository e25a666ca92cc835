"""What an evaluation found, as rows of one schema: in memory, in evaluation.json, and as tables. Imports no torch."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from megazebra.durable import write_atomically
from megazebra.errors import UserError

FORMAT_VERSION = 1
COLUMNS = {
    "task": "what was asked",
    "length": "tokens of the whole sequence; texts are as long as fits, less than a sentence below it",
    "depth": "where the answer stands in the text, from 0 (beginning) to 1; null where it stands anywhere",
    "start": "first scored position of the sequence (the number of tokens before it, less one); null for answers",
    "end": "the position behind the last scored one",
    "samples": "sequences",
    "tokens": "scored tokens of all of them",
    "loss": "their mean cross-entropy in nats",
    "perplexity": "its exponential; null for answers",
    "token_accuracy": "share of the scored tokens that are the likeliest after the true ones before them",
    "exact_match": "share of the samples with every scored token so: greedy decoding gives the answer; null for text",
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the results; COLUMNS says what each field means."""

    task: str
    length: int
    depth: float | None = None
    start: int | None = None
    end: int | None = None
    samples: int
    tokens: int
    loss: float | None
    perplexity: float | None = None
    token_accuracy: float | None
    exact_match: float | None = None


def save_results(path: str | Path, rows: Sequence[Row], about: Mapping[str, Any]) -> None:
    """Write evaluation.json in one step; about: what was evaluated and how, as JSON."""
    content = {
        "format": FORMAT_VERSION,
        **about,
        "columns": COLUMNS,
        "rows": [{name: _json_number(value) for name, value in asdict(row).items()} for row in rows],
    }
    write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())


def load_results(path: str | Path) -> tuple[list[Row], dict[str, Any]]:
    """Rows and what was said about them. Raises UserError when the file is no evaluation of this format."""
    try:
        about = json.loads(Path(path).read_text())
        version, rows = about.pop("format"), [Row(**row) for row in about.pop("rows")]
        del about["columns"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no evaluation ({error!r}); make it again with tools/evaluate.py") from error
    if version != FORMAT_VERSION:
        raise UserError(f"{path} has format {version!r}, this version reads {FORMAT_VERSION}; make it again")
    return rows, about


def table(rows: Sequence[Row]) -> Iterator[str]:
    """Lines for people: one row each, without the columns that are empty in all of them."""
    names = [field.name for field in fields(Row) if any(getattr(row, field.name) is not None for row in rows)]
    cells = [[_heading(name) for name in names], *([_cell(name, getattr(row, name)) for name in names] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        first, *others = zip(line, widths, strict=True)
        yield "  ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)])


def _heading(name: str) -> str:
    return name.replace("_", " ")


def _cell(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if name in ("depth", "token_accuracy", "exact_match"):
        return f"{value:.0%}" if name == "depth" else f"{value:.1%}"
    return f"{value:,.4f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def _json_number(value: Any) -> Any:
    """JSON knows neither NaN nor infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
