"""Folders of text to a training and a validation corpus with their tokenizer: the work of tools/preprocess_data.py."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from megazebra.data.corpus.corpus_writer import SUFFIXES, CorpusWriter
from megazebra.data.corpus.indexed_corpus import Corpus
from megazebra.data.corpus.sidecar import CorpusMeta
from megazebra.data.errors import CorpusError
from megazebra.data.prepare.text_files import (
    TextFile,
    gather_text_files,
    manifest_fingerprint,
    name_hash,
    read_text,
    split_files,
)
from megazebra.data.prepare.tokenizer import (
    EOD_TOKEN,
    eod_id,
    load_tokenizer,
    save_tokenizer,
    tokenizer_fingerprint,
    train_byte_level_bpe,
    vocab_size,
)
from megazebra.data.prepare.unigram import unigram_cross_entropy
from megazebra.durable import sync_folder

# Merges learned from more text than this hardly differ; learning them takes memory and time in proportion.
TOKENIZER_TEXT_BYTES = 32 * 2**20
BATCH_BYTES = 2 * 2**20

Progress = Callable[[int, int, int], None]


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """What to build and from what.

    inputs: folders or `stdlib`. output: folder for train.*, validation.* and tokenizer.json. Exactly one of
    train_tokenizer (vocabulary size of a new byte-level BPE) and tokenizer (path of a tokenizer.json). globs: of
    file names. eod: token appended to every document. validation_share: of the files, by hash of their names.
    force: replace what is in `output`.
    """

    inputs: tuple[str, ...]
    output: str
    train_tokenizer: int | None = None
    tokenizer: str | None = None
    globs: tuple[str, ...] = ()
    eod: str = EOD_TOKEN
    validation_share: float = 0.02
    force: bool = False


@dataclass
class Report:
    """What was built, or found: sidecars of both corpora, and the files left out."""

    up_to_date: bool
    train: CorpusMeta
    validation: CorpusMeta | None
    undecodable: list[str] = field(default_factory=list)
    empty: list[str] = field(default_factory=list)


def preprocess(
    job: Preprocessing,
    *,
    say: Callable[[str], None] = lambda sentence: None,
    progress: Progress = lambda done_bytes, total_bytes, tokens: None,
) -> Report:
    """Build both corpora and the tokenizer, or find that they are there already.

    say: receives a sentence at each stage. progress: receives bytes of text done and in all, and tokens so far.

    Raises CorpusError for unusable inputs or tokenizers, for a corpus of other inputs or options in the output
    folder without `force`, and while another process builds there. Files of a build that fails never appear.
    """
    tokenizer = load_tokenizer(job.tokenizer) if job.tokenizer else None
    if (tokenizer is None) == (job.train_tokenizer is None):
        raise CorpusError("give either --train-tokenizer VOCAB or --tokenizer FILE")
    if not 0 <= job.validation_share < 1:
        raise CorpusError(f"--validation-share {job.validation_share} is outside [0, 1); give a share such as 0.02")
    files = gather_text_files(job.inputs, job.globs, exclude=job.output)
    train_files, validation_files = split_files(files, job.validation_share)
    corpora = {"train": train_files} | ({"validation": validation_files} if validation_files else {})
    request = _request(job, files, tokenizer)
    folder = Path(job.output)
    folder.mkdir(parents=True, exist_ok=True)
    with _only_builder(folder):
        found = None if job.force else _existing(folder, request, list(corpora))
        if found:
            return found
        say(f"{len(files)} files, {sum(file.bytes for file in files) / 1e6:.1f} MB of text")
        return _build(job, corpora, tokenizer, request, say, progress)


def _build(
    job: Preprocessing,
    corpora: dict[str, list[TextFile]],
    tokenizer: Tokenizer | None,
    request: dict[str, Any],
    say: Callable[[str], None],
    progress: Progress,
) -> Report:
    folder = Path(job.output)
    if tokenizer is None:
        assert job.train_tokenizer is not None
        tokenizer = _train_tokenizer(corpora["train"], job.train_tokenizer, say)
    end = eod_id(tokenizer, job.eod)
    origin = {"path": "tokenizer.json", "fingerprint": tokenizer_fingerprint(tokenizer)}
    skipped = _Skipped()
    done_bytes = done_tokens = 0
    total_bytes = sum(file.bytes for files in corpora.values() for file in files)
    say("encoding")
    with contextlib.ExitStack() as stack:
        # Corpora appear when the block ends, the last one entered first: train.idx implies all the others.
        writers = {
            name: stack.enter_context(CorpusWriter(folder / name, vocab_size=vocab_size(tokenizer), eod_id=end))
            for name in corpora
        }
        for name, files in corpora.items():
            writers[name].record(request=request, tokenizer=origin, inputs=_inputs(files))
            for text_bytes, tokens in _encode(writers[name], files, tokenizer, end, skipped):
                done_bytes, done_tokens = done_bytes + text_bytes, done_tokens + tokens
                progress(done_bytes, total_bytes, done_tokens)
            _require_tokens(name, writers[name])
        if "validation" in writers:
            bar = unigram_cross_entropy(writers["train"].token_counts, writers["validation"].token_counts)
            writers["validation"].record(unigram_cross_entropy=bar)
        writers["train"].withdraw_previous()
        _remove_corpus(folder / "validation")
        save_tokenizer(tokenizer, folder / "tokenizer.json")
    train, validation = (_meta(folder / name) if name in corpora else None for name in ("train", "validation"))
    assert train is not None
    return Report(False, train, validation, skipped.undecodable, skipped.empty)


def _train_tokenizer(files: list[TextFile], size: int, say: Callable[[str], None]) -> Tokenizer:
    """Learn merges from training text only, from a spread of the files where there is more than enough."""
    chosen: list[TextFile] = []
    chosen_bytes = 0
    for file in sorted(files, key=name_hash):
        if chosen and chosen_bytes + file.bytes > TOKENIZER_TEXT_BYTES:
            continue
        chosen.append(file)
        chosen_bytes += file.bytes
    amount = "all" if len(chosen) == len(files) else f"a sample of {len(chosen)} files"
    say(f"training a byte-level BPE tokenizer of {size} tokens on {amount} ({chosen_bytes / 1e6:.1f} MB)")
    texts = (text for _, text in _texts(sorted(chosen), _Skipped()) if text)
    tokenizer = train_byte_level_bpe(texts, size)
    learned = vocab_size(tokenizer)
    if learned < size:
        say(f"the text has pairs for {learned} tokens only, fewer than the {size} asked for")
    return tokenizer


def _encode(
    corpus: CorpusWriter, files: list[TextFile], tokenizer: Tokenizer, end: int, skipped: _Skipped
) -> Iterator[tuple[int, int]]:
    """Encode the files into the corpus; yields bytes of text and tokens of each batch."""
    for batch, text_bytes in _batches(_texts(files, skipped)):
        tokens_before = corpus.tokens
        for encoding in tokenizer.encode_batch_fast(batch, add_special_tokens=False):
            corpus.add_document([*encoding.ids, end])
        yield text_bytes, corpus.tokens - tokens_before


@dataclass
class _Skipped:
    undecodable: list[str] = field(default_factory=list)
    empty: list[str] = field(default_factory=list)


def _texts(files: Iterable[TextFile], skipped: _Skipped) -> Iterator[tuple[int, str | None]]:
    """Bytes and text of each file; None where there is nothing to encode."""
    for file in files:
        text = None
        try:
            text = read_text(file) or None
            if text is None:
                skipped.empty.append(file.name)
        except UnicodeDecodeError:
            skipped.undecodable.append(file.name)
        yield file.bytes, text


def _batches(texts: Iterable[tuple[int, str | None]]) -> Iterator[tuple[list[str], int]]:
    """Texts by about BATCH_BYTES, enough of them to keep every encoder thread busy, with the bytes they took."""
    batch: list[str] = []
    batch_bytes = 0
    for text_bytes, text in texts:
        batch_bytes += text_bytes
        if text is not None:
            batch.append(text)
        if batch_bytes >= BATCH_BYTES:
            yield batch, batch_bytes
            batch, batch_bytes = [], 0
    if batch_bytes:
        yield batch, batch_bytes


def _request(job: Preprocessing, files: list[TextFile], tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Everything that decides the corpora's content, as the sidecars record it."""
    return {
        "files": len(files),
        "manifest": manifest_fingerprint(files),
        "tokenizer": tokenizer_fingerprint(tokenizer) if tokenizer else f"byte-level BPE of {job.train_tokenizer}",
        "eod": job.eod,
        "validation_share": job.validation_share,
    }


def _inputs(files: list[TextFile]) -> dict[str, Any]:
    return {
        "files": len(files),
        "bytes": sum(file.bytes for file in files),
        "manifest": manifest_fingerprint(files),
    }


def _existing(folder: Path, request: dict[str, Any], corpora: list[str]) -> Report | None:
    """What an earlier run of the same request left, None where it is incomplete.

    Raises CorpusError where something else is there that `force` alone may replace.
    """
    if not (folder / "train.idx").exists():
        return None
    try:
        found = {name: _meta(folder / name) for name in corpora if (folder / f"{name}.idx").exists()}
    except CorpusError as error:
        raise CorpusError(f"{folder} holds a damaged corpus ({error}); pass --force to replace it") from error
    for name, meta in found.items():
        recorded = (meta.request if meta else None) or {}
        details = [
            f"{key} was {recorded.get(key)!r}, is {value!r}"
            for key, value in request.items()
            if recorded.get(key) != value
        ]
        if details:
            raise CorpusError(
                f"{folder / name} is a corpus of other inputs or options ({', '.join(details)}); "
                "pass --force to replace it, or give another --output"
            )
    if list(found) != corpora or not (folder / "tokenizer.json").exists():
        return None
    train = found["train"]
    assert train is not None
    return Report(True, train, found.get("validation"))


def _meta(prefix: Path) -> CorpusMeta | None:
    """The sidecar of a corpus that opens without complaint."""
    corpus = Corpus.open(prefix, field="--output")
    corpus.close()
    return corpus.meta


def _require_tokens(name: str, corpus: CorpusWriter) -> None:
    if corpus.tokens == 0:
        raise CorpusError(
            f"no {name} file holds UTF-8 text; give more --input or another --glob, or change --validation-share"
        )


def _remove_corpus(prefix: Path) -> None:
    for suffix in reversed(SUFFIXES):
        Path(f"{prefix}{suffix}").unlink(missing_ok=True)
    sync_folder(prefix.parent)


@contextlib.contextmanager
def _only_builder(folder: Path) -> Iterator[None]:
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
