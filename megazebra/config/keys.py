"""The schema seen as dotted keys: names, documentation, allowed values in words, suggestions."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any, get_args, get_origin

from pydantic.fields import FieldInfo

from megazebra.config.schema import Config, Section


@cache
def sections() -> dict[str, type[Section]]:
    """Every section by its dotted name; the whole configuration is ''."""
    found: dict[str, type[Section]] = {"": Config}

    def visit(section: type[Section], prefix: str) -> None:
        for name, field in section.model_fields.items():
            if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
                found[prefix + name] = field.annotation
                visit(field.annotation, f"{prefix}{name}.")

    visit(Config, "")
    return found


@cache
def fields() -> dict[str, FieldInfo]:
    """Every key that takes a value by its dotted name, in the schema's order."""
    return {
        join(prefix, name): field
        for prefix, section in sections().items()
        for name, field in section.model_fields.items()
        if join(prefix, name) not in sections()
    }


def entry_section(key: str) -> type[Section] | None:
    """What stands under each name of a key that takes sections by name (data.sources); None for other keys."""
    annotation = fields()[key].annotation
    if get_origin(annotation) is dict and issubclass(entry := get_args(annotation)[1], Section):
        return entry
    return None


def named_entry(key: str) -> tuple[str, list[str]] | None:
    """data.sources.code.weight as the key that takes entries by name, and the path inside it; None for other keys."""
    names = key.split(".")
    for end in range(1, len(names)):
        outer = ".".join(names[:end])
        if outer in fields() and get_origin(fields()[outer].annotation) is dict:
            return outer, names[end:]
    return None


def is_section(key: str) -> bool:
    return key != "" and key in sections()


def join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as dotted keys; an empty section is a value."""
    keys: dict[str, Any] = {}
    for key, value in tree.items():
        keys |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return keys


def value_of(section: Section, key: str) -> Any:
    """The value under a dotted key of a section (or of the whole Config), in YAML's types."""
    value: Any = section.model_dump()
    for name in key.split("."):
        value = value[name]
    return value


def documentation(key: str) -> str:
    """The text under a key or section in the schema, on one line."""
    prefix, _, name = key.rpartition(".")
    return documentation_in(sections()[prefix], name)


def documentation_in(section: type[Section], name: str) -> str:
    """The same for one key of a section."""
    return " ".join((section.model_fields[name].description or "").split())


@cache
def allowed_values(key: str) -> str:
    """What a key takes, in words: 'a whole number >= 1 or null'."""
    prefix, _, name = key.rpartition(".")
    return values_in_words(sections()[prefix], name)


def values_in_words(section: type[Section], name: str) -> str:
    """What one key of a section takes."""
    schema = section.model_json_schema()
    return _words(schema["properties"][name], schema.get("$defs", {}))


def _words(schema: dict[str, Any], definitions: dict[str, Any]) -> str:
    if "anyOf" in schema:
        return " or ".join(_words(choice, definitions) for choice in schema["anyOf"])
    if "enum" in schema:
        return " | ".join(str(choice) for choice in schema["enum"])
    if schema["type"] == "array":
        if "prefixItems" in schema:
            return f"[{', '.join(_words(item, definitions) for item in schema['prefixItems'])}]"
        return f"[{_words(schema['items'], definitions)}, ...]"
    if schema["type"] == "object":
        entry = schema["additionalProperties"]
        if entry is True:  # checked elsewhere
            return "{KEY: VALUE, ...}"
        if "$ref" in entry:
            properties = definitions[entry["$ref"].rpartition("/")[2]]["properties"]
            return f"{{NAME: {{{', '.join(f'{name}: ...' for name in properties)}}}, ...}}"
        return f"{{NAME: {_words(entry, definitions)}, ...}}"
    names = {
        "integer": "a whole number",
        "number": "a number",
        "boolean": "true or false",
        "string": "text",
        "null": "null",
    }
    bounds = (("minimum", ">="), ("exclusiveMinimum", ">"), ("maximum", "<="), ("exclusiveMaximum", "<"))
    limits = [f"{sign} {schema[bound]:.15g}" for bound, sign in bounds if bound in schema]
    return f"{names[schema['type']]} {' and '.join(limits)}".rstrip()


def did_you_mean(name: str, candidates: Iterable[str]) -> str:
    """'; did you mean ...?' for a name close to the candidates, else ''.

    A dotted candidate whose last part is right counts as close: `steps` is meant as `train.steps`.
    """
    candidates = list(candidates)
    last = name.rpartition(".")[2]
    close = [candidate for candidate in candidates if candidate.rpartition(".")[2] == last][:4]
    close = close or difflib.get_close_matches(name, candidates, n=1)
    if not close:
        typo = difflib.get_close_matches(last, [candidate.rpartition(".")[2] for candidate in candidates], n=1)
        close = [candidate for candidate in candidates if typo and candidate.rpartition(".")[2] == typo[0]][:4]
    if not close:
        return ""
    return f"; did you mean {' or '.join(repr(candidate) for candidate in close)}?"
