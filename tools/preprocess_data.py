"""Turn folders of text into a corpus to train on.

    python tools/preprocess_data.py --input stdlib --train-tokenizer 4096 --output data/stdlib

writes data/stdlib/train.{bin,idx,meta.json}, data/stdlib/validation.* and data/stdlib/tokenizer.json. Every file is
a document that ends with the EOD token. A second run with the same inputs and options finds the work done.
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
from megazebra.data.prepare.preprocess import Preprocessing, Report, preprocess
from megazebra.data.prepare.tokenizer import EOD_TOKEN

SECONDS_PER_LINE = 5.0


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--input",
        action="append",
        required=True,
        metavar="FOLDER",
        help="folder of text files, or the word stdlib for the running Python's standard library; repeatable",
    )
    parser.add_argument("--output", required=True, metavar="FOLDER", help="where the corpora and tokenizer.json go")
    parser.add_argument(
        "--glob",
        action="append",
        default=[],
        metavar="PATTERN",
        help="file names to take, such as '*.txt'; repeatable (default: *.py of stdlib, every file of a folder)",
    )
    tokenizer = parser.add_mutually_exclusive_group(required=True)
    tokenizer.add_argument(
        "--train-tokenizer", type=int, metavar="VOCAB", help="train a byte-level BPE with this many tokens"
    )
    tokenizer.add_argument("--tokenizer", metavar="FILE", help="use this tokenizer.json")
    parser.add_argument(
        "--eod", default=EOD_TOKEN, metavar="TOKEN", help="token that ends a document (default: %(default)s)"
    )
    parser.add_argument(
        "--validation-share",
        type=float,
        default=0.02,
        metavar="SHARE",
        help="share of the files held out, chosen by hash of their names; 0 for none (default: %(default)s)",
    )
    parser.add_argument("--workers", type=int, metavar="N", help="encoder threads (default: all cores)")
    parser.add_argument("--force", action="store_true", help="build even if the output holds a corpus; replace it")
    parsed = parser.parse_args(arguments)
    if parsed.workers is not None and parsed.workers < 1:
        parser.error(f"--workers {parsed.workers}: give at least 1")
    return parsed


class Progress:
    """Text and tokens so far: a bar on a terminal, a line every few seconds elsewhere."""

    def __init__(self, is_terminal: bool) -> None:
        self._is_terminal = is_terminal
        self._bar: tqdm | None = None
        self._start = self._printed = time.monotonic()

    def say(self, sentence: str) -> None:
        print(sentence, flush=True)
        self._start = self._printed = time.monotonic()

    def __call__(self, done_bytes: int, total_bytes: int, tokens: int) -> None:
        now = time.monotonic()
        rate = tokens / max(now - self._start, 1e-9)
        if self._is_terminal:
            if self._bar is None:
                self._bar = tqdm(total=total_bytes, unit="B", unit_scale=True, desc="encoding", leave=False)
            self._bar.set_postfix_str(f"{rate:,.0f} tokens/s", refresh=False)
            self._bar.update(done_bytes - self._bar.n)
        elif now - self._printed >= SECONDS_PER_LINE:
            self._printed = now
            print(
                f"encoded {done_bytes / max(total_bytes, 1):.0%}, {tokens:,} tokens, {rate:,.0f} tokens/s", flush=True
            )

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def summarize(report: Report, output: str, seconds: float) -> None:
    if report.up_to_date:
        print(f"{output} is up to date: the same inputs and options built it (--force builds it again)")
    else:
        tokens = report.train.tokens + (report.validation.tokens if report.validation else 0)
        print(f"wrote {output}: {tokens:,} tokens in {seconds:.1f} s")
    skipped = (("not UTF-8", report.undecodable), ("empty", report.empty))
    for reason, names in skipped:
        if names:
            print(f"skipped {len(names)} files that are {reason}, such as {names[0]!r}")
    _summarize_corpus("train", report.train)
    print(f"  unigram entropy {report.train.unigram_entropy:.4f} nats per token")
    if report.validation:
        _summarize_corpus("validation", report.validation)
        print(f"  the bar to beat: unigram cross-entropy {report.validation.unigram_cross_entropy:.4f} nats per token")


def _summarize_corpus(name: str, meta: CorpusMeta) -> None:
    print(f"{name}: {meta.documents:,} documents, {meta.tokens:,} tokens of a vocabulary of {meta.vocab_size:,}")


def main(arguments: Sequence[str] | None = None) -> int:
    parsed = parse_arguments(arguments)
    if parsed.workers is not None:
        # The tokenizers library starts its threads at its first batch and takes their number from here.
        os.environ["RAYON_NUM_THREADS"] = str(parsed.workers)
    job = Preprocessing(
        inputs=tuple(parsed.input),
        output=parsed.output,
        train_tokenizer=parsed.train_tokenizer,
        tokenizer=parsed.tokenizer,
        globs=tuple(parsed.glob),
        eod=parsed.eod,
        validation_share=parsed.validation_share,
        force=parsed.force,
    )
    progress = Progress(sys.stderr.isatty())
    start = time.monotonic()
    try:
        report = preprocess(job, say=progress.say, progress=progress)
    except (CorpusError, OSError) as error:
        progress.close()
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        progress.close()
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    progress.close()
    summarize(report, parsed.output, time.monotonic() - start)
    return 0


if __name__ == "__main__":
    sys.exit(main())
