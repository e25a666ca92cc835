"""YAML text to settings that remember where they were written, and values back to YAML.

The values are YAML 1.2's core types. PyYAML follows YAML 1.1, where `1e-3` is text, `no` is false and
`1:30` is 90; none of these is what somebody who writes a training configuration means.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

import yaml

from megazebra.config.errors import ConfigError

_DIGITS = "[0-9]+(?:_[0-9]+)*"
_CORE_TYPES = (
    ("null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    ("bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")),
    ("int", re.compile(r"^[-+]?(?:0|[1-9][0-9]*(?:_[0-9]+)*)$"), list("-+0123456789")),
    (
        "float",
        re.compile(
            rf"^[-+]?(?:(?:{_DIGITS}\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|{_DIGITS}[eE][-+]?[0-9]+"
            r"|\.(?:inf|Inf|INF))$|^\.(?:nan|NaN|NAN)$"
        ),
        list("-+0123456789."),
    ),
)


_DEEPEST = 32  # levels of nesting; a configuration has five


class _Loader(yaml.SafeLoader):
    # Starts empty: YAML 1.1's rules are not inherited.
    yaml_implicit_resolvers: dict[str, list[Any]] = {}  # noqa: RUF012

    def fetch_tag(self) -> NoReturn:
        raise yaml.scanner.ScannerError(None, None, "tags such as !!float are not used here", self.get_mark())

    # With aliases a few lines could stand for billions of values.
    def fetch_anchor(self) -> NoReturn:
        self._refuse_alias()

    def fetch_alias(self) -> NoReturn:
        self._refuse_alias()

    def _refuse_alias(self) -> NoReturn:
        message = "anchors and aliases (&name, *name) are not used here; put text that begins so in quotes"
        raise yaml.scanner.ScannerError(None, None, message, self.get_mark())

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self._depth = getattr(self, "_depth", 0) + 1
        if self._depth > _DEEPEST:
            raise yaml.composer.ComposerError(None, None, "it is nested too deeply", self.peek_event().start_mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node


class _Dumper(yaml.SafeDumper):
    """Quotes text that YAML 1.1 or our loader would read as another type; lists stand on one line where they fit."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_sequence(self, tag: str, sequence: Any, flow_style: bool | None = None) -> yaml.SequenceNode:
        return super().represent_sequence(tag, sequence, flow_style=True)


for _name, _pattern, _first in _CORE_TYPES:
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", _pattern, _first)
    _Dumper.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", _pattern, _first)


@dataclass(frozen=True)
class Setting:
    """One key given a value.

    source: `examples/tiny.yaml:12` or `command line --train.steps=20`.
    problem: why the value could not be read, or ''.
    """

    key: str
    value: Any
    source: str
    problem: str = ""


def read_settings(text: str, name: str, is_section: Callable[[str], bool]) -> list[Setting]:
    """The settings of a YAML document; mappings are entered only where `is_section(dotted key)`.

    Raises ConfigError, with file and line, for text that is no YAML mapping.
    """
    root = _compose(text, name)
    if root is None or root.tag.endswith(":null"):
        return []
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(
            [f"{name}:{_line(root)}: must be a mapping of sections, such as 'train:' and under it 'steps: 20'"]
        )
    return list(_settings(root, "", is_section, lambda node: f"{name}:{_line(node)}"))


def read_override(override: str, is_section: Callable[[str], bool]) -> list[Setting]:
    """The settings of one `train.steps=20` (or `--train.steps=20`); the value is YAML.

    Raises ConfigError when there is no value or it is no YAML.
    """
    key, _, text = override.removeprefix("--").partition("=")
    source = f"command line --{key}={_shortened(text)}"
    if not key or not text.strip():
        raise ConfigError([f"command line --{key}: has no value; write --{key or 'section.key'}=VALUE (null for none)"])
    node = _compose(text, source)
    if isinstance(node, yaml.MappingNode) and is_section(key):
        return list(_settings(node, f"{key}.", is_section, lambda _: source))
    return [_setting(key, node, source)]


def to_yaml(value: dict[str, Any], width: int = 118) -> str:
    """A mapping as YAML that `read_settings` gives back unchanged."""
    return yaml.dump(value, Dumper=_Dumper, default_flow_style=False, sort_keys=False, width=width)


def shown(value: Any) -> str:
    """A value as messages and help print it: YAML on one short line."""
    text = yaml.dump(value, Dumper=_Dumper, default_flow_style=True, width=10**9)
    return _shortened(text.removesuffix("\n").removesuffix("\n..."))


def _shortened(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 80 else text[:77] + "..."


def _compose(text: str, name: str) -> yaml.Node | None:
    def error(line: int | None, message: str) -> ConfigError:
        at = "" if line is None or name.startswith("command line") else f":{line + 1}"
        return ConfigError([f"{name}{at}: is not valid YAML: {message}"])

    try:
        return _Loader(text).get_single_node()
    except yaml.MarkedYAMLError as problem:
        message = ", ".join(part for part in (problem.context, problem.problem) if part)
        mark = problem.problem_mark or problem.context_mark
        raise error(mark.line if mark else None, message) from None
    except yaml.reader.ReaderError as problem:
        message = f"the character U+{problem.character:04X} may not stand here"
        raise error(text.count("\n", 0, problem.position), message) from None


def _settings(
    mapping: yaml.MappingNode,
    prefix: str,
    is_section: Callable[[str], bool],
    source_of: Callable[[yaml.Node], str],
) -> Iterator[Setting]:
    first: dict[str, int] = {}
    for key_node, value_node in mapping.value:
        source = source_of(key_node)
        name = key_node.value if isinstance(key_node, yaml.ScalarNode) else "?"
        key = prefix + name
        if name in first:
            yield Setting(key, None, source, f"is given twice in this section (first on line {first[name]}); keep one")
            continue
        first[name] = _line(key_node)
        if is_section(key) and isinstance(value_node, yaml.MappingNode) and value_node.value:
            yield from _settings(value_node, f"{key}.", is_section, source_of)
        else:
            yield _setting(key, value_node, source)


def _setting(key: str, node: yaml.Node | None, source: str) -> Setting:
    try:
        return Setting(key, _value(node), source)
    except ValueError as problem:
        return Setting(key, None, source, str(problem))


def _value(node: yaml.Node | None) -> Any:
    if isinstance(node, yaml.SequenceNode):
        return [_value(item) for item in node.value]
    if isinstance(node, yaml.MappingNode):
        return {_value(key) if isinstance(key, yaml.ScalarNode) else "?": _value(item) for key, item in node.value}
    if node is None or node.tag.endswith(":null"):
        return None
    kind, text = node.tag.rpartition(":")[2], node.value
    if kind == "bool":
        return text.lower() == "true"
    if kind == "int":
        return int(text)
    if kind == "float":
        return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    return text


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1
