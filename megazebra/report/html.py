"""Pieces of a page. Whatever is put into one is escaped here and nowhere else: only `Html` passes as it is."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


class Html(str):
    """Text that is HTML already."""


def escaped(value: Any) -> Html:
    return value if isinstance(value, Html) else Html(html.escape(str(value)))


def joined(parts: Iterable[Any]) -> Html:
    return Html("".join(map(escaped, parts)))


def element(tag: str, *content: Any, **attributes: str) -> Html:
    named = "".join(f' {name.rstrip("_")}="{html.escape(value)}"' for name, value in attributes.items())
    return Html(f"<{tag}{named}>{joined(content)}</{tag}>")


def section(title: str, *content: Any) -> Html:
    """A titled part of the page; nothing where it has no content."""
    inside = joined(content)
    return element("section", element("h2", title), inside) if inside else Html("")


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> Html:
    """Numbers stand to the right."""
    body = [element("tr", *(_cell(value) for value in row)) for row in rows]
    if not body:
        return Html("")
    head = element("tr", *(element("th", name, scope="col") for name in columns))
    return element("div", element("table", element("thead", head), element("tbody", *body)), class_="scroll")


def facts(values: Mapping[str, Any]) -> Html:
    """Names and values, one a line."""
    rows = [element("tr", element("th", name, scope="row"), _cell(value)) for name, value in values.items()]
    return element("table", element("tbody", *rows), class_="facts") if rows else Html("")


def details(title: str, *content: Any) -> Html:
    """A part that is closed until the reader opens it; nothing where it has no content."""
    inside = joined(content)
    return element("details", element("summary", title), inside) if inside else Html("")


def picture(png: bytes, description: str) -> Html:
    """A picture that the page holds itself."""
    source = "data:image/png;base64," + base64.b64encode(png).decode()
    return Html(f'<img src="{source}" alt="{html.escape(description)}">')


def number(value: Any, digits: int = 4) -> str:
    """A value for people: counts whole, other numbers to `digits` significant ones."""
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    size = abs(value)
    return f"{value:,.0f}" if size >= 10**digits else f"{value:,.{digits}g}"


def amount(value: float | None, unit: str) -> str:
    """With a prefix of the SI: 1.5 MB."""
    if value is None:
        return "–"
    for size, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}"


def _cell(value: Any) -> Html:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return element("td", number(value), class_="number")
    return element("td", "–" if value is None else value)
