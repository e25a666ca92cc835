"""What an earlier build left in the output folder, and the lock that keeps two builds apart."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megazebra.data.corpus.indexed_corpus import Corpus
from megazebra.data.errors import CorpusError

Corpora = tuple[Corpus, Corpus | None]


def existing_corpora(folder: Path, request: dict[str, Any], tokenizer_file: str) -> Corpora | None:
    """The training and validation corpus, closed, that a build of the same request left, None where incomplete.

    Raises CorpusError where something else is there that `--force` alone may replace.
    """
    if not (folder / "train.idx").exists():
        return None
    try:
        train = open_output(folder / "train")
        validation = open_output(folder / "validation") if (folder / "validation.idx").exists() else None
    except CorpusError as error:
        raise CorpusError(f"{folder} holds a damaged corpus ({error}); pass --force to replace it") from error
    for corpus in filter(None, (train, validation)):
        _require_same(corpus.prefix, request, (corpus.meta.request if corpus.meta else None) or {})
    assert train.meta is not None  # it was built by this request
    expected = (train.meta.inputs or {}).get("validation_documents", request["validation_share"])
    complete = (folder / tokenizer_file).exists() and bool(expected) == (validation is not None)
    return (train, validation) if complete else None


def open_output(prefix: Path) -> Corpus:
    """A corpus that opens without complaint, closed: for its lengths and its sidecar."""
    corpus = Corpus(prefix, field="--output")
    corpus.close()
    return corpus


@contextlib.contextmanager
def only_builder(folder: Path) -> Iterator[None]:
    """Hold a lock on the folder; the kernel drops it with the process, so none is ever left behind."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CorpusError(f"another process is building {folder}; wait for it, or give another --output") from None
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(descriptor)


def _require_same(prefix: str, request: dict[str, Any], recorded: dict[str, Any]) -> None:
    details = [
        f"{key} was {recorded.get(key)!r}, is {request.get(key)!r}"
        for key in {**request, **recorded}
        if recorded.get(key) != request.get(key)
    ]
    if details:
        raise CorpusError(
            f"{prefix} is a corpus of other inputs or options ({', '.join(details)}); "
            "pass --force to replace it, or give another --output"
        )
