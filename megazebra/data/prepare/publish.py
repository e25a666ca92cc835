"""The parts of a build to the corpora they were made for."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megazebra.data.corpus.corpus_writer import SUFFIXES
from megazebra.data.corpus.indexed_corpus import Corpus
from megazebra.data.corpus.unigram import unigram_cross_entropy
from megazebra.data.prepare.encoders.encoded import DocumentEncoder
from megazebra.data.prepare.parts import PartReport, PartsFolder, corpus_writer
from megazebra.durable import sync_folder

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")


def publish(
    folder: Path,
    parts: PartsFolder,
    reports: Sequence[Sequence[PartReport]],
    encoder: DocumentEncoder,
    sidecars: dict[str, dict[str, Any]],
) -> None:
    """Join the parts in the order of their tasks and put corpora and tokenizer in place of what `folder` holds.

    sidecars: fields of the sidecar for each corpus to write. Whichever step is the last, what opens afterwards is of
    one build: train.idx goes first and comes last.
    """
    with contextlib.ExitStack() as stack:
        # Corpora appear when the block ends, the last one entered first.
        writers = {name: stack.enter_context(corpus_writer(folder / name, encoder)) for name in sidecars}
        for task, task_reports in enumerate(reports):
            for number, report in enumerate(task_reports):
                for name in report.corpora:
                    corpus = Corpus(parts.part(task, number) / name, field="part")
                    writers[name].append(corpus)
                    corpus.close()
        tokenizer = {"path": encoder.file_name, "fingerprint": encoder.fingerprint}
        for name, fields in sidecars.items():
            writers[name].record(tokenizer=tokenizer, **fields)
        if "validation" in writers:
            bar = unigram_cross_entropy(writers["train"].token_counts, writers["validation"].token_counts)
            writers["validation"].record(unigram_cross_entropy=bar)
        held_out = writers["validation"].documents if "validation" in writers else 0
        writers["train"].record(inputs={**sidecars["train"]["inputs"], "validation_documents": held_out})
        writers["train"].withdraw_previous()
        _remove_others(folder, encoder.file_name)
        encoder.save(folder)


def _remove_others(folder: Path, tokenizer_file: str) -> None:
    """Remove what the new build may not replace."""
    for suffix in reversed(SUFFIXES):
        Path(f"{folder / 'validation'}{suffix}").unlink(missing_ok=True)
    for name in TOKENIZER_FILES:
        if name != tokenizer_file:
            (folder / name).unlink(missing_ok=True)
    sync_folder(folder)
