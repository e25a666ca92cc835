"""The text of --help: every key with what it takes, its default and its documentation."""

from __future__ import annotations

import shutil
import textwrap

from megazebra.config import keys
from megazebra.config.schema import Config, Section
from megazebra.config.yaml_source import shown

_USAGE = """\
usage: pretrain_zebra.py [--config FILE] [--deepspeed_config FILE] [--section.key=value ...]

  --config FILE            YAML file with the keys below
  --deepspeed_config FILE  JSON file for DeepSpeed, merged over what the keys below give
  -h, --help               this text

Any key may be set in the file or, over it, on the command line: --train.steps=20 or --train.steps 20;
lists as --model.pattern=[G,L,128,L], named entries as --data.sources='{code: {path: data/code}}', nothing as null;
keys of a stage as --stages.long.train.steps=20.
"""


def help_text(width: int | None = None) -> str:
    """All keys grouped by section, wrapped to `width` columns (None: the terminal's)."""
    width = max(40, min(width or shutil.get_terminal_size().columns, 120))
    defaults = Config()
    documented: dict[type[Section], str] = {}
    lines = [_USAGE]
    # The run's own keys, which are in no section, come last.
    for name, section in sorted(keys.sections().items(), key=lambda item: item[0] == ""):
        own = [key for key in keys.fields() if key.rpartition(".")[0] == name]
        if not own:
            continue
        # Two sections of one class (the ropes of global and local layers) are explained once.
        twin = documented.setdefault(section, name)
        heading = f"{name}: {keys.documentation(name)}".removesuffix(": ") if name else "The whole run:"
        lines.append(_wrapped(heading + (f" Keys as in {twin}." if twin != name else ""), width, ""))
        for key in own:
            takes = f"--{key}={shown(keys.value_of(defaults, key))}  ({keys.allowed_values(key)})"
            lines.append(_wrapped(takes, width, "  "))
            if twin == name:
                lines.append(_wrapped(keys.documentation(key), width, "      "))
            if entry := keys.entry_section(key):
                for part in entry.model_fields:
                    lines.append(_wrapped(f"{part}  ({keys.values_in_words(entry, part)})", width, "      "))
                    lines.append(_wrapped(keys.documentation_in(entry, part), width, "          "))
        lines.append("")
    return "\n".join(lines).rstrip()


def _wrapped(text: str, width: int, indent: str) -> str:
    return textwrap.fill(
        text,
        width,
        initial_indent=indent,
        subsequent_indent=indent or "  ",
        break_long_words=False,
        break_on_hyphens=False,
    )
