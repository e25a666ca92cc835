"""The tasks that a run evaluates on its way, from its configuration."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from megazebra.config.schema import Config
from megazebra.data.prepare.encoders.tokenizer import load_tokenizer, vocab_size
from megazebra.data.sources import Source
from megazebra.errors import UserError
from megazebra.evaluate.cell import Cell
from megazebra.evaluate.plan import Plan
from megazebra.evaluate.recall.texts import Encoder


def evaluation_cells(config: Config, held_out: Mapping[str, Source]) -> list[Cell]:
    """What `evaluation` asks for, of the first held-out corpus where it is about text; nothing without tasks.

    Raises UserError when a document is too short, a question does not fit, or the tokenizer is another model's.
    """
    asked = config.evaluation
    if not asked.tasks:
        return []
    source = next(iter(held_out.values()), None)
    return Plan(
        tasks=asked.tasks,
        lengths=asked.lengths or (config.data.seq_len,),
        depths=asked.depths,
        samples=asked.samples,
        vocab_size=config.model.vocab_size,
        corpus=source.corpus if source is not None else None,
        encoder=None if asked.tokenizer is None else _encoder(asked.tokenizer, config.model.vocab_size),
    ).cells()


def _encoder(path: str, tokens: int) -> Encoder:
    if not Path(path).is_file():
        raise UserError(f"evaluation.tokenizer={path} is no file; name a tokenizer.json")
    tokenizer = load_tokenizer(Path(path))
    if vocab_size(tokenizer) > tokens:
        raise UserError(
            f"evaluation.tokenizer={path} has {vocab_size(tokenizer):,} tokens, model.vocab_size is {tokens:,}; "
            "name the one that the corpus was made with"
        )
    return Encoder(tokenizer)
