"""What an earlier build left in the output folder, and the lock that keeps two builds apart."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megazebra.data.corpus.indexed_corpus import Corpus
from megazebra.data.corpus.sidecar import CorpusMeta
from megazebra.data.errors import CorpusError

Corpora = tuple[CorpusMeta, CorpusMeta | None]


def existing_corpora(folder: Path, request: dict[str, Any], tokenizer_file: str) -> Corpora | None:
    """Sidecars of the training and validation corpus that a build of the same request left, None where incomplete.

    Raises CorpusError where something else is there that `--force` alone may replace.
    """
    if not (folder / "train.idx").exists():
        return None
    try:
        train = corpus_meta(folder / "train")
        validation = corpus_meta(folder / "validation") if (folder / "validation.idx").exists() else None
    except CorpusError as error:
        raise CorpusError(f"{folder} holds a damaged corpus ({error}); pass --force to replace it") from error
    for name, meta in (("train", train), ("validation", validation)):
        if name == "train" or (folder / "validation.idx").exists():
            _require_same(folder / name, request, (meta.request if meta else None) or {})
    assert train is not None
    expected = (train.inputs or {}).get("validation_documents", request["validation_share"])
    complete = (folder / tokenizer_file).exists() and bool(expected) == (validation is not None)
    return (train, validation) if complete else None


def corpus_meta(prefix: Path) -> CorpusMeta | None:
    """The sidecar of a corpus that opens without complaint."""
    corpus = Corpus.open(prefix, field="--output")
    corpus.close()
    return corpus.meta


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


def _require_same(prefix: Path, request: dict[str, Any], recorded: dict[str, Any]) -> None:
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
