"""What travels with a model's weights: its tokenizer's files, and which tokens begin and end a text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megazebra.errors import UserError

GENERATION_NAME = "generation_config.json"
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_TOKENIZER_NAMES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


def tokenizer_files(folder: Path) -> list[str]:
    """Names of the tokenizer's files that the folder has."""
    return [name for name in _TOKENIZER_NAMES if (folder / name).exists()]


def generation_config(folder: Path) -> dict[str, Any]:
    """The folder's generation_config.json, empty where it has none. Raises UserError when it is no JSON object."""
    path = folder / GENERATION_NAME
    if not path.exists():
        return {}
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {error}; mend or remove it") from error


def with_token_ids(generation: Mapping[str, Any], ids: Mapping[str, Any]) -> dict[str, Any]:
    """The generation config with the ids that are given in place of its own."""
    return dict(generation) | {name: ids[name] for name in TOKEN_IDS if ids.get(name) is not None}


def as_json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()
