"""From a YAML file and overrides to a checked Config, and back to a file."""

from __future__ import annotations

import copy
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megazebra.config import keys, stages
from megazebra.config.checks import cross_problems
from megazebra.config.errors import ConfigError
from megazebra.config.schema import Config, Section
from megazebra.config.yaml_source import Setting, read_override, read_settings, shown, to_yaml
from megazebra.durable import write_atomically

# Where the type alone says too little.
_FORMS = {
    "model.pattern": "a string to tile, such as GLLL, or a list of every layer, such as [G, 128, L]",
    "profile.steps": "the first and the last step, such as 10:12, or null",
}
_NOTES = {"model.window": " (the window counts the query itself)"}
_LIMITS = {
    "greater_than_equal": "must be >= {ge:.15g}",
    "greater_than": "must be > {gt:.15g}",
    "less_than_equal": "must be <= {le:.15g}",
    "less_than": "must be < {lt:.15g}",
    "finite_number": "must be finite",
}


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """The configuration of a YAML file (None: the defaults) with `section.key=value` overrides on top.

    Raises ConfigError with every problem at once: files and overrides that cannot be read, unknown keys,
    values of the wrong type or range, and combinations of keys that don't fit.
    """
    settings: list[Setting] = []
    problems: list[str] = []
    file_is_readable = True
    try:
        settings += [] if path is None else _read_file(Path(path))
    except ConfigError as error:
        problems += error.problems
        file_is_readable = False
    for override in overrides:
        try:
            settings += read_override(override, stages.is_section)
        except ConfigError as error:
            problems += error.problems

    outside, by_stage = _by_stage(settings)
    run = _Resolved(outside)
    problems += run.problems
    # A run of stages never runs as the values outside them stand: only its stages need to fit together.
    if file_is_readable and not by_stage:
        problems += run.cross_problems()
    problems += _overruled(outside, by_stage)
    trees: dict[str, dict[str, Any]] = {}
    for name, own in by_stage.items():
        refusals = [_refusal(setting) for setting in own]
        own = [setting for setting, refusal in zip(own, refusals, strict=True) if refusal is None]
        stage = _Resolved([*outside, *own])
        found = [*filter(None, refusals), *stage.problems, *(stage.cross_problems() if file_is_readable else [])]
        problems += [f"stage {name}: {problem}" for problem in found if problem not in run.problems]
        trees[name] = _nested(stage.accepted[key] for key in _field_keys(own) if key in stage.accepted)
    if problems:
        raise ConfigError(problems)
    config = Config.model_validate({**run.sections, "stages": trees})
    if problems := list(stages.problems_between(config)):
        raise ConfigError(problems)
    return config


class _Resolved:
    """What settings come to, the later ones over the earlier.

    accepted: by key, those that name one. sections: those whose values are all right. problems: all others.
    """

    def __init__(self, settings: Sequence[Setting]) -> None:
        self.accepted: dict[str, Setting] = {}
        self.sections: dict[str, Section] = {}
        self.problems: list[str] = []
        self._doubtful: set[str] = set()  # sections whose values are not all known: no check across keys would be fair
        for setting in settings:
            if entry := keys.named_entry(setting.key):
                setting = _within_entries(*entry, setting, self.accepted)
            if problem := _structural_problem(setting):
                self.problems.append(problem)
                self._doubtful.add(setting.key.partition(".")[0])
            elif setting.key in keys.fields():
                self.accepted[setting.key] = setting
        tree = _nested(self.accepted.values())
        for name in (name for name in Config.model_fields if keys.is_section(name)):
            try:
                # Strict: `true` is no number and "5" no whole number. Construction in Python stays lenient.
                self.sections[name] = keys.sections()[name].model_validate(tree.get(name, {}), strict=True)
            except ValidationError as error:
                self.problems += _value_problems(name, error, self.accepted)

    def cross_problems(self) -> list[str]:
        """What does not fit together in the sections that are right in themselves."""
        sound = {name: section for name, section in self.sections.items() if name not in self._doubtful}
        problems = []
        for key, message in cross_problems(sound):
            section, _, rest = key.partition(".")
            source = self.accepted[key].source if key in self.accepted else "default"
            problems.append(_problem(source, key, keys.value_of(sound[section], rest), message))
        return problems


def save_config(config: Config, path: str | Path) -> None:
    """Write every key with its value and documentation; `load_config` gives back an equal Config.

    A reader sees the old file or the whole new one. Raises OSError when the folder is missing or not writable.
    """
    write_atomically(path, ("\n".join(_yaml_lines(config, "")) + "\n").encode())


def _read_file(path: Path) -> list[Setting]:
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise ConfigError([f"{path}: no such file"]) from None
    except (OSError, ValueError) as error:  # ValueError: a name with a null byte
        raise ConfigError([f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}"]) from None
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ConfigError([f"{path}:{line}: is not UTF-8; save the file as UTF-8"]) from None
    return read_settings(text, str(path), stages.is_section)


def _by_stage(settings: Iterable[Setting]) -> tuple[list[Setting], dict[str, list[Setting]]]:
    """The settings outside stages, and by stage those in it, under the keys that they have outside."""
    outside: list[Setting] = []
    by_stage: dict[str, list[Setting]] = {}
    for setting in settings:
        if split := stages.split_key(setting.key):
            name, key = split
            by_stage.setdefault(name, []).append(replace(setting, key=key))
        elif setting.key.startswith("stages.") and setting.value in (None, {}):  # a stage that sets nothing
            if setting.source.startswith("command line"):
                outside.append(replace(setting, problem="a stage can't be removed here; take it out of the file"))
            else:
                by_stage.setdefault(setting.key.removeprefix("stages."), [])
        else:
            outside.append(setting)
    return outside, by_stage


def _overruled(outside: Iterable[Setting], by_stage: dict[str, list[Setting]]) -> Iterator[str]:
    """What somebody asks for on the command line and no stage would do."""
    for setting in outside:
        overruled = [
            name
            for name, own in by_stage.items()
            if any(setting.key == stage.key or setting.key.startswith(f"{stage.key}.") for stage in own)
        ]
        if setting.source.startswith("command line") and by_stage and len(overruled) == len(by_stage):
            every = " and ".join(f"--stages.{name}.{setting.key}" for name in overruled)
            yield _problem(setting.source, setting.key, setting.value, f"every stage sets it anew; set {every}")


def _refusal(setting: Setting) -> str | None:
    """Why a stage may not set this; None where it may, or where the key is wrong anyway."""
    known = setting.key in keys.fields() or keys.is_section(setting.key) or keys.named_entry(setting.key)
    objection = stages.objection(setting.key) if known else None
    return _problem(setting.source, setting.key, setting.value, objection) if objection else None


def _field_keys(settings: Iterable[Setting]) -> list[str]:
    """The keys that take the settings' values: of an entry by name, the key that has the entries."""
    return list(dict.fromkeys((keys.named_entry(setting.key) or [setting.key])[0] for setting in settings))


def _within_entries(key: str, path: list[str], setting: Setting, accepted: dict[str, Setting]) -> Setting:
    """The whole of a key that takes entries by name, as a setting of one of them or of a value in it leaves it."""
    entries = copy.deepcopy(accepted[key].value) if key in accepted else {}
    place = entries
    for name in path[:-1]:
        place = place.setdefault(name, {}) if isinstance(place, dict) else {}
    if isinstance(place, dict):
        place[path[-1]] = setting.value
    return Setting(key, entries, setting.source, setting.problem)


def _structural_problem(setting: Setting) -> str:
    """What is wrong whatever the type of the value, or ''."""
    if setting.problem:
        return f"{setting.source}: {setting.key}: {setting.problem}"
    if keys.is_section(setting.key):
        if setting.value in (None, {}):  # `train:` with every key under it commented out
            return ""
        example = next(key for key in keys.fields() if key.startswith(f"{setting.key}."))
        return _problem(setting.source, setting.key, setting.value, f"is a section; set its keys, such as {example}")
    if setting.key == "stages" and setting.value:
        form = "a mapping of stages, such as {long: {data: {seq_len: 16384}}}"
        return _problem(setting.source, setting.key, setting.value, f"must be {form}")
    if setting.key not in keys.fields():
        suggestion = keys.did_you_mean(setting.key, [*keys.fields(), *filter(None, keys.sections())])
        return f"{setting.source}: unknown key {setting.key!r}{suggestion}"
    return ""


def _nested(settings: Iterable[Setting]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for setting in settings:
        *path, name = setting.key.split(".")
        place = tree
        for part in path:
            place = place.setdefault(part, {})
        place[name] = tuple(setting.value) if isinstance(setting.value, list) else setting.value
    return tree


def _value_problems(section: str, error: ValidationError, accepted: dict[str, Setting]) -> Iterator[str]:
    """One line per key: pydantic reports every branch of a union and every element of a list."""
    seen: set[str] = set()
    for detail in error.errors(include_url=False):
        parts = [section, *(str(part) for part in detail["loc"])]
        key = next(name for n in range(len(parts), 0, -1) if (name := ".".join(parts[:n])) in keys.fields())
        setting = accepted[key]
        entry = keys.entry_section(key)
        inside = parts[key.count(".") + 1 :]
        if entry is not None and inside and inside[-1] != "[key]":
            yield f"{setting.source}: {_entry_problem('.'.join(parts), entry, inside[1:], detail)}"
            continue
        if key in seen:
            continue
        seen.add(key)
        # The limits of an element are told with the whole form: 'must be [a number > 0, ...]'.
        if detail["type"] in _LIMITS and ".".join(parts) == key:
            message = _LIMITS[detail["type"]].format(**detail.get("ctx", {}))
        else:
            message = f"must be {_FORMS.get(key) or keys.allowed_values(key)}"
        message += _NOTES.get(key, "")
        if isinstance(setting.value, bool | int | float) and "text" in message:
            message += "; put it in quotes to make it text"
        yield _problem(setting.source, key, setting.value, message)


def _entry_problem(key: str, entry: type[Section], inside: list[str], detail: Any) -> str:
    """What is wrong with a named entry such as data.sources.code, or with its value at `inside`."""
    if not inside:
        return f"{key}={shown(detail['input'])}: must be a mapping of {', '.join(entry.model_fields)}"
    name = inside[0]
    if name not in entry.model_fields:
        return f"unknown key {key!r}{keys.did_you_mean(name, entry.model_fields)}"
    if detail["type"] == "missing":
        return f"{key} is missing: {keys.documentation_in(entry, name)}"
    return f"{key}={shown(detail['input'])}: must be {keys.values_in_words(entry, name)}"


def _problem(source: str, key: str, value: Any, message: str) -> str:
    subject = f"{key}={shown(value)}"
    # 'command line --train.steps=abc' has already said it.
    return f"{source}: {message}" if source.endswith(f" --{subject}") else f"{source}: {subject}: {message}"


def _yaml_lines(section: Section, prefix: str) -> Iterator[str]:
    indent = "  " * prefix.count(".")
    for name in type(section).model_fields:
        value = getattr(section, name)
        if text := keys.documentation(prefix + name):
            yield textwrap.fill(text, 118, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")
        if isinstance(value, Section):
            yield f"{indent}{name}:"
            yield from _yaml_lines(value, f"{prefix}{name}.")
        else:
            plain = section.model_dump(include={name})
            yield textwrap.indent(to_yaml(plain).rstrip("\n"), indent)
