"""Data sets of long question answering, written as JSON lines."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megazebra.data.errors import CorpusError
from megazebra.data.prepare.encoders.tokenizer import byte_tokenizer, load_tokenizer
from megazebra.data.prepare.long_qa.conversation import Wanted, make_conversation
from megazebra.data.prepare.long_qa.filler import Filler
from megazebra.data.prepare.long_qa.names import Side
from megazebra.data.prepare.long_qa.ruler import CharacterRuler, Ruler, TokenRuler
from megazebra.durable import text_file

BYTES = "bytes"


@dataclass(frozen=True, kw_only=True)
class LongQA:
    """inputs, globs, text_key: texts, as tools/preprocess_data.py takes them. wanted: what conversations are like.
    tokenizer: a tokenizer.json, a folder with one, or `bytes`; None: lengths are in characters. held_out_share: of the
    names and of the texts that only validation conversations use."""

    inputs: tuple[str, ...]
    wanted: Wanted
    globs: tuple[str, ...] = ()
    text_key: str = "text"
    tokenizer: str | None = None
    held_out_share: float = 0.2
    seed: int = 1234

    def conversations(self, *, validation: bool) -> Iterator[dict[str, Any]]:
        """Without end: number i is the same whatever their number.

        Raises CorpusError for values that are no use, missing inputs or tokenizers, and lengths without room for the
        facts.
        """
        self._check()
        ruler = open_ruler(self.tokenizer)
        side = Side(validation, self.held_out_share)
        filler = Filler(
            self.inputs,
            self.globs,
            text_key=self.text_key,
            share=self.held_out_share,
            validation=validation,
            seed=self.seed,
        )
        stream = random.Random(f"{self.seed} {'validation' if validation else 'train'}")
        while True:
            yield make_conversation(self.wanted, stream, side, filler, ruler)

    def _check(self) -> None:
        self.wanted.check()
        if not 0 < self.held_out_share < 1:
            raise CorpusError(f"--held-out-share {self.held_out_share} is outside (0, 1); give a share such as 0.2")


def open_ruler(tokenizer: str | None) -> Ruler:
    """Raises CorpusError where there is no such tokenizer."""
    if tokenizer is None:
        return CharacterRuler()
    if tokenizer == BYTES:
        return TokenRuler(byte_tokenizer())
    path = Path(tokenizer)
    return TokenRuler(load_tokenizer(path / "tokenizer.json" if path.is_dir() else path))


def write_json_lines(path: Path, records: Iterator[dict[str, Any]]) -> int:
    """Write the records to `path`, which appears when it is whole; how many there were."""
    count = 0
    with text_file(path) as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
            count += 1
    return count
