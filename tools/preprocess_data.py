"""Turn text, JSON lines or Parquet into a corpus to train on.

    preprocess_data.py --input stdlib --train-tokenizer 4096 --output data/stdlib
    preprocess_data.py --input web/*.jsonl.zst --tokenizer Qwen3-8B/ --output data/web
    preprocess_data.py --input chats.parquet --tokenizer Qwen3-8B/ --chat-template tokenizer --output data/chats

writes OUTPUT/train.{bin,idx,meta.json}, OUTPUT/validation.* and OUTPUT/tokenizer.json. Files that end in .jsonl,
.ndjson, their .gz or .zst, .json.gz, .json.zst or .parquet hold records, one document each; any other file is one text.
A second run with the same inputs and options finds the work done; one that was cut short goes on where it stopped.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence

from tqdm import tqdm

from megazebra.data.corpus.sidecar import CorpusMeta
from megazebra.data.errors import CorpusError
from megazebra.data.prepare.job import Preprocessing
from megazebra.data.prepare.open_encoder import BYTES, NO_EOD, EncoderOptions
from megazebra.data.prepare.preprocess import Report, preprocess
from megazebra.data.prepare.workers import WorkerDiedError

SECONDS_PER_LINE = 5.0
# What became of over-long conversations, by policy.
OVERLONG = {"keep": "kept whole", "drop": "dropped", "truncate": "truncated", "error": "refused"}


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    files = parser.add_argument_group("files")
    files.add_argument(
        "--input",
        action="extend",
        nargs="+",
        required=True,
        metavar="PATH",
        help="folders, files, or the word stdlib for the running Python's standard library; repeatable",
    )
    files.add_argument("--output", required=True, metavar="FOLDER", help="where the corpora and the tokenizer go")
    files.add_argument(
        "--glob",
        action="append",
        default=[],
        metavar="PATTERN",
        help="names of files to take from folders, such as '*.txt'; repeatable (default: *.py of stdlib, else all)",
    )
    files.add_argument("--force", action="store_true", help="build even if the output holds a corpus; replace it")

    documents = parser.add_argument_group("documents")
    documents.add_argument(
        "--documents",
        choices=("file", "directory"),
        default="file",
        help="a text file is a document, or all those of one directory, joined by name (default: %(default)s)",
    )
    documents.add_argument(
        "--text-key",
        default="text",
        metavar="KEY",
        help="where a record has its text; a.b for b inside a (default: %(default)s)",
    )
    documents.add_argument(
        "--skip-bad-records", action="store_true", help="leave records without text out instead of stopping there"
    )
    documents.add_argument(
        "--validation-share",
        type=float,
        default=0.02,
        metavar="SHARE",
        help="share of the documents held out, by hash of a file's name or a record's content; 0 for none "
        "(default: %(default)s)",
    )

    encoding = parser.add_argument_group("encoding")
    tokenizer = encoding.add_mutually_exclusive_group(required=True)
    tokenizer.add_argument(
        "--train-tokenizer", type=int, metavar="VOCAB", help="train a byte-level BPE with this many tokens"
    )
    tokenizer.add_argument(
        "--tokenizer",
        metavar="PATH",
        help=f"a tokenizer.json, a folder that holds one, a sentencepiece .model, or the word {BYTES}",
    )
    end = encoding.add_mutually_exclusive_group()
    end.add_argument("--eod", metavar="TOKEN", help="token that ends a document (default: the tokenizer's own)")
    end.add_argument("--no-eod", action="store_const", dest="eod", const=NO_EOD, help="end documents with no token")
    encoding.add_argument(
        "--engine",
        choices=("auto", "tokenizers", "gigatoken"),
        default="auto",
        help="what encodes: auto takes gigatoken where it is installed and gives the same tokens as tokenizers",
    )
    encoding.add_argument("--workers", type=int, metavar="N", help="cores to use (default: all)")

    chat = parser.add_argument_group("conversations")
    chat.add_argument(
        "--chat-template",
        metavar="TEMPLATE",
        help="records are conversations in this format: a built-in name, a .jinja file, or the word tokenizer",
    )
    chat.add_argument(
        "--messages-key", default="messages", metavar="KEY", help="where a record has them (default: %(default)s)"
    )
    chat.add_argument("--max-tokens", type=int, metavar="N", help="a longer conversation is over-long")
    chat.add_argument(
        "--overlong",
        choices=tuple(OVERLONG),
        default="keep",
        help="what becomes of over-long conversations (default: %(default)s)",
    )
    parsed = parser.parse_args(arguments)
    if parsed.workers is not None and parsed.workers < 1:
        parser.error(f"--workers {parsed.workers}: give at least 1")
    return parsed


def job_of(parsed: argparse.Namespace) -> Preprocessing:
    return Preprocessing(
        inputs=tuple(parsed.input),
        output=parsed.output,
        encoder=EncoderOptions(
            tokenizer=parsed.tokenizer or "",
            eod=parsed.eod,
            engine=parsed.engine,
            chat=parsed.chat_template,
            messages=parsed.messages_key,
            max_tokens=parsed.max_tokens,
            overlong=parsed.overlong,
        ),
        train_tokenizer=parsed.train_tokenizer,
        globs=tuple(parsed.glob),
        documents=parsed.documents,
        text_key=parsed.text_key,
        skip_bad_records=parsed.skip_bad_records,
        validation_share=parsed.validation_share,
        workers=parsed.workers or available_cores(),
        force=parsed.force,
    )


def available_cores() -> int:
    """Those this process may run on, where the system tells (Linux)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Progress:
    """Input and tokens so far: a bar on a terminal, a line every few seconds elsewhere."""

    def __init__(self, is_terminal: bool) -> None:
        self._is_terminal = is_terminal
        self._bar: tqdm | None = None
        self._start: tuple[float, int, int] | None = None
        self._printed = 0.0

    def say(self, sentence: str) -> None:
        self.close()
        print(sentence, flush=True)

    def __call__(self, done_bytes: int, total_bytes: int, tokens: int) -> None:
        now = time.monotonic()
        if self._start is None:
            self._begin(now, done_bytes, total_bytes, tokens)
        assert self._start is not None
        began, found_bytes, found_tokens = self._start
        seconds = max(now - began, 1e-9)
        rate = (tokens - found_tokens) / seconds
        if self._bar is not None:
            self._bar.set_postfix_str(f"{rate:,.0f} tokens/s", refresh=False)
            self._bar.update(done_bytes - self._bar.n)
        elif now - self._printed >= SECONDS_PER_LINE and done_bytes > found_bytes:
            self._printed = now
            left = seconds * (total_bytes - done_bytes) / (done_bytes - found_bytes)
            print(
                f"encoded {done_bytes / max(total_bytes, 1):.0%}, {tokens:,} tokens, {rate:,.0f} tokens/s, "
                f"{tqdm.format_interval(left)} left",
                flush=True,
            )

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _begin(self, now: float, done_bytes: int, total_bytes: int, tokens: int) -> None:
        if done_bytes:
            self.say(f"going on from {done_bytes / total_bytes:.0%}, {tokens:,} tokens are there")
        self._start, self._printed = (now, done_bytes, tokens), now
        if self._is_terminal:
            self._bar = tqdm(
                total=total_bytes, initial=done_bytes, unit="B", unit_scale=True, desc="encoding", leave=False
            )


def summarize(report: Report, job: Preprocessing, seconds: float) -> None:
    if report.up_to_date:
        print(f"{job.output} is up to date: the same inputs and options built it (--force builds it again)")
    else:
        tokens = report.train.tokens + (report.validation.tokens if report.validation else 0)
        print(f"wrote {job.output}: {tokens:,} tokens in {seconds:.1f} s")
    for line in report.skipped.lines():
        print(line)
    _summarize_lengths(report, job)
    _summarize_corpus("train", report.train)
    print(f"  unigram entropy {report.train.unigram_entropy:.4f} nats per token")
    if report.validation:
        _summarize_corpus("validation", report.validation)
        print(f"  the bar to beat: unigram cross-entropy {report.validation.unigram_cross_entropy:.4f} nats per token")


def _summarize_lengths(report: Report, job: Preprocessing) -> None:
    sentence = f"longest {'conversation' if job.encoder.chat else 'document'}: {report.longest:,} tokens"
    if job.encoder.max_tokens is not None:
        sentence += f"; {report.overlong:,} longer than --max-tokens {job.encoder.max_tokens}"
        sentence += f", {OVERLONG[job.encoder.overlong]}" if report.overlong else ""
    print(sentence)


def _summarize_corpus(name: str, meta: CorpusMeta) -> None:
    print(f"{name}: {meta.documents:,} documents, {meta.tokens:,} tokens of a vocabulary of {meta.vocab_size:,}")


def main(arguments: Sequence[str] | None = None) -> int:
    parsed = parse_arguments(arguments)
    if parsed.workers is not None:
        # Where the tokenizers library, which also trains, looks when it starts its threads.
        os.environ["RAYON_NUM_THREADS"] = str(parsed.workers)
    job = job_of(parsed)
    progress = Progress(sys.stderr.isatty())
    start = time.monotonic()
    try:
        report = preprocess(job, say=progress.say, progress=progress)
    except (CorpusError, OSError, WorkerDiedError) as error:
        progress.close()
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        progress.close()
        print("interrupted; the same command goes on from the parts that are done", file=sys.stderr)
        return 130
    progress.close()
    summarize(report, job, time.monotonic() - start)
    return 0


if __name__ == "__main__":
    sys.exit(main())
