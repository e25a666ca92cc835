"""Text and records to a training and a validation corpus with their tokenizer: the work of tools/preprocess_data.py."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from megazebra import __version__
from megazebra.data.corpus.indexed_corpus import Corpus
from megazebra.data.corpus.sidecar import CorpusMeta
from megazebra.data.errors import CorpusError
from megazebra.data.prepare.encode_task import Work
from megazebra.data.prepare.encoders.encoded import DocumentEncoder
from megazebra.data.prepare.encoders.gigatoken_engine import GigatokenError
from megazebra.data.prepare.encoders.tokenizer import save_tokenizer, train_byte_level_bpe, vocab_size
from megazebra.data.prepare.inputs.records import RecordOptions
from megazebra.data.prepare.inputs.sampling import sample_texts
from megazebra.data.prepare.inputs.tasks import Task
from megazebra.data.prepare.job import Preprocessing, Sources
from megazebra.data.prepare.open_encoder import EncoderOptions, has_choice_of_engines, open_encoder, with_gigatoken
from megazebra.data.prepare.output_folder import existing_corpora, only_builder, open_output
from megazebra.data.prepare.parts import PartReport, PartsFolder, Skipped
from megazebra.data.prepare.publish import publish
from megazebra.data.prepare.workers import run_tasks

# Merges learned from more text than this hardly differ; learning them takes memory and time in proportion.
TOKENIZER_TEXT_BYTES = 32 * 2**20
# What a faster engine is tried on before it is taken.
TRIAL_BYTES = 2**20
TRIAL_CHARACTERS = 4096
CORPORA = ("train", "validation")

Say = Callable[[str], None]
ShowProgress = Callable[[int, int, int], None]


@dataclass
class Report:
    """What was built, or found: sidecars of both corpora, and what was left out.

    longest: document, in tokens, and overlong: how many are beyond --max-tokens; both before any was truncated or
    dropped, but of the corpora as they are where those were found.
    """

    up_to_date: bool
    train: CorpusMeta
    validation: CorpusMeta | None
    longest: int
    overlong: int
    skipped: Skipped = field(default_factory=Skipped)


def preprocess(
    job: Preprocessing,
    *,
    say: Say = lambda sentence: None,
    progress: ShowProgress = lambda done_bytes, total_bytes, tokens: None,
) -> Report:
    """Build both corpora and the tokenizer, or find that they are there already.

    say: receives a sentence at each stage. progress: receives bytes of input done and in all, and tokens so far; its
    first call tells what an earlier build, cut short, has left to go on from.

    Raises CorpusError for unusable inputs or tokenizers, for a corpus of other inputs or options in the output
    folder without `force`, and while another process builds there; WorkerDiedError where a worker process was killed.
    Files of a build that fails never appear; its finished parts wait in `output`/.parts for the same build again.
    """
    job.check()
    encoder = open_encoder(job.encoder_here) if job.train_tokenizer is None else None
    sources = Sources.gather(job)
    request = sources.request(job, encoder.recipe if encoder else None)
    folder = Path(job.output)
    folder.mkdir(parents=True, exist_ok=True)
    with only_builder(folder):
        parts = PartsFolder(folder, _build_id(job, request))
        tokenizer_file = encoder.file_name if encoder else "tokenizer.json"
        found = None if job.force else existing_corpora(folder, request, tokenizer_file)
        if found:
            parts.remove_all()  # there are some if the build was killed at its very end
            return _found(job, *found)
        say(f"{len(sources.files)} files, {sum(file.bytes for file in sources.files) / 1e6:.1f} MB")
        parts.prepare(with_bad_records=job.skip_bad_records)
        if parts.has_neighbours():
            say(f"{parts.path.parent} has parts of a build of other inputs or options; they go when this one is done")
        try:
            return _build(job, sources, request, encoder, parts, say, progress)
        finally:
            if not parts.holds_documents():
                parts.remove()


def _build(
    job: Preprocessing,
    sources: Sources,
    request: dict[str, Any],
    encoder: DocumentEncoder | None,
    parts: PartsFolder,
    say: Say,
    progress: ShowProgress,
) -> Report:
    tasks = sources.tasks(job)
    encoder_options = job.encoder_here
    if encoder is None:
        assert job.train_tokenizer is not None
        path = _trained_tokenizer(job.train_tokenizer, tasks, job.record_options, parts, say)
        encoder_options = replace(encoder_options, tokenizer=str(path))
        encoder = open_encoder(encoder_options)
    if encoder_options.engine == "auto":
        encoder_options, encoder = _with_fastest_engine(encoder_options, encoder, tasks, job.record_options, say)
    say(f"encoding with {encoder.description}")
    work = Work(encoder=encoder_options, records=job.record_options, parts=parts, sizes=job.sizes)
    _encode(work, encoder, tasks, job.workers, progress)
    reports = [parts.done(number) for number in range(len(tasks))]
    every_report = list(itertools.chain.from_iterable(reports))
    skipped = Skipped()
    for report in every_report:
        skipped.merge(report.skipped)
    sidecars = {
        name: {"request": request, "inputs": sources.described(validation=name == "validation")}
        for name in _corpora(job, sources, reports, skipped, say)
    }
    say("joining the parts")
    publish(Path(job.output), parts, reports, encoder, sidecars)
    parts.remove_all()
    train, validation = (open_output(Path(job.output, name)).meta if name in sidecars else None for name in CORPORA)
    assert train is not None
    longest = max(report.longest for report in every_report)
    return Report(False, train, validation, longest, sum(report.overlong for report in every_report), skipped)


def _found(job: Preprocessing, *corpora: Corpus | None) -> Report:
    train, validation = (corpus.meta if corpus else None for corpus in corpora)
    assert train is not None
    lengths = np.concatenate([corpus.document_lengths for corpus in corpora if corpus])
    limit = job.encoder.max_tokens
    overlong = 0 if limit is None else int((lengths > limit).sum())
    return Report(True, train, validation, int(lengths.max()), overlong)


def _trained_tokenizer(size: int, tasks: Sequence[Task], options: RecordOptions, parts: PartsFolder, say: Say) -> Path:
    """The path of a new tokenizer, learned from training text only; of the one that is among the parts already."""
    path = parts.path / "tokenizer.json"
    if path.exists():
        return path
    total_bytes = sum(task.bytes for task in tasks)
    amount = "all text" if total_bytes <= TOKENIZER_TEXT_BYTES else f"{TOKENIZER_TEXT_BYTES / 1e6:.0f} MB of the text"
    say(f"training a byte-level BPE tokenizer of {size} tokens on {amount}")
    tokenizer = train_byte_level_bpe(sample_texts(tasks, options, TOKENIZER_TEXT_BYTES), size)
    learned = vocab_size(tokenizer)
    if learned < size:
        say(f"the text has pairs for {learned} tokens only, fewer than the {size} asked for")
    save_tokenizer(tokenizer, path)
    return path


def _with_fastest_engine(
    options: EncoderOptions, encoder: DocumentEncoder, tasks: Sequence[Task], records: RecordOptions, say: Say
) -> tuple[EncoderOptions, DocumentEncoder]:
    """What `auto` stands for: settled here once, so that all workers have the same."""
    if has_choice_of_engines(encoder):
        try:
            faster = with_gigatoken(encoder, options.threads)
            faster.encode([text[:TRIAL_CHARACTERS] for text in sample_texts(tasks, records, TRIAL_BYTES)])
            return replace(options, engine="gigatoken"), faster
        except GigatokenError as error:
            say(f"not with gigatoken: {error}")
    return replace(options, engine="tokenizers"), encoder


def _encode(work: Work, encoder: DocumentEncoder, tasks: Sequence[Task], workers: int, progress: ShowProgress) -> None:
    """Make the parts that are not there yet."""
    total_bytes = sum(task.bytes for task in tasks)
    positions = [0] * len(tasks)
    tokens = 0
    waiting: list[tuple[int, Task]] = []
    for number, task in enumerate(tasks):
        done = work.parts.done(number)
        tokens += sum(report.tokens for report in done)
        positions[number] = done[-1].position if done else 0
        if not (done and done[-1].complete):
            waiting.append((number, task))
    done_bytes = sum(positions)
    progress(done_bytes, total_bytes, tokens)
    for step in run_tasks(work, encoder, waiting, workers):
        done_bytes += step.position - positions[step.task]
        positions[step.task] = step.position
        tokens += step.tokens
        progress(done_bytes, total_bytes, tokens)


def _corpora(
    job: Preprocessing, sources: Sources, reports: Sequence[Sequence[PartReport]], skipped: Skipped, say: Say
) -> list[str]:
    """Names of the corpora to publish. Raises CorpusError where one has no document that should have some."""
    written = {name for report in itertools.chain.from_iterable(reports) for name in report.corpora}
    expected = {"train"} | {"validation" for document in sources.texts if document.validation}
    for name in sorted(expected - written):
        raise CorpusError(
            "; ".join([f"there is no {name} document", *skipped.lines()])
            + "; give more --input or another --glob, or change --validation-share"
        )
    if job.validation_share > 0 and "validation" not in written:
        say(f"--validation-share {job.validation_share} holds out none of the documents; there is no validation corpus")
    return [name for name in CORPORA if name in written]


def _build_id(job: Preprocessing, request: dict[str, Any]) -> str:
    """Equal for builds that can go on from each other's parts."""
    settings = [job.encoder.engine, job.encoder.max_tokens, job.sizes.task, __version__]
    decides = [{**request, "skip_bad_records": None}, *settings]
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:16]
