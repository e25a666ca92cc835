"""Look into a corpus: what it holds, how long its documents are, what they say, whether its files are whole.

    python tools/inspect_data.py data/stdlib/train --lengths lengths.png --sample 0 --verify

PREFIX is the path of the corpus without .bin or .idx; corpora that Megatron wrote serve as well.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megazebra.data.corpus.indexed_corpus import Corpus
from megazebra.data.corpus.length_chart import chart_lines, draw_lengths
from megazebra.data.corpus.statistics import describe, length_histogram
from megazebra.data.errors import CorpusError
from megazebra.data.prepare.decoding import Decode, decode_document, open_decoder, own_tokenizer
from megazebra.durable import write_atomically

SAMPLE_TOKENS = 80


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prefix", metavar="PREFIX", help="path of the corpus, without suffix")
    parser.add_argument("--lengths", type=Path, metavar="FILE.png", help="draw the histogram of document lengths")
    parser.add_argument(
        "--sample",
        type=int,
        action="append",
        default=[],
        metavar="N",
        help=f"print the first {SAMPLE_TOKENS} tokens of document N as text; repeatable",
    )
    parser.add_argument(
        "--tokenizer", metavar="FILE", help="tokenizer.json or sentencepiece .model (default: the corpus's own)"
    )
    parser.add_argument("--verify", action="store_true", help="compare all files with their checksums")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    return parser.parse_args(arguments)


def inspect(options: argparse.Namespace) -> None:
    corpus = Corpus(options.prefix, field="PREFIX")
    decode = _open_decoder(corpus, options)
    histogram = length_histogram(corpus.document_lengths)
    facts = describe(corpus, histogram)
    samples = {n: decode_document(corpus, n, SAMPLE_TOKENS, decode or _numbers) for n in options.sample}
    if options.lengths:
        name = "/".join(Path(corpus.prefix).parts[-2:])
        title = f"{name}: {corpus.documents:,} documents, {corpus.tokens:,} tokens"
        write_atomically(options.lengths, draw_lengths(histogram, title))
    if not options.json:
        print("\n".join([corpus.prefix, *(f"  {name:<12}{value}" for name, value in _fact_lines(facts, decode))]))
        print("\n".join(["", *chart_lines(histogram)]))
        for document, text in samples.items():
            note = "" if decode else "; ids, since its tokenizer is not here (--tokenizer names one)"
            print(f"\ndocument {document}, {corpus.document_lengths[document]:,} tokens{note}:")
            print("\n".join(f"  | {line}" for line in text.split("\n")))
    if options.verify:
        _verify(corpus)
    if options.json:
        print(json.dumps({**facts, "samples": samples, "verified": options.verify}, indent=1))
    elif options.verify:
        print(f"\nverified: .idx and the {facts['bytes']:,} bytes of .bin match their checksums")


def _open_decoder(corpus: Corpus, options: argparse.Namespace) -> Decode | None:
    if options.tokenizer:
        return open_decoder(options.tokenizer)
    try:
        tokenizer = own_tokenizer(corpus)
        return open_decoder(tokenizer) if tokenizer else None
    except CorpusError as error:
        if options.sample:
            raise
        print(f"note: {error}", file=sys.stderr)
        return None


def _verify(corpus: Corpus) -> None:
    with tqdm(total=1, unit="B", unit_scale=True, desc="verifying", leave=False, disable=None) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        corpus.verify(show)


def _numbers(ids: list[int]) -> str:
    return " ".join(map(str, ids))


def _fact_lines(facts: dict[str, Any], decode: Decode | None) -> Iterator[tuple[str, str]]:
    yield "documents", f"{facts['documents']:,}"
    yield "tokens", f"{facts['tokens']:,}"
    yield "bytes", f"{facts['bytes']:,} of {facts['dtype']}"
    if facts["sidecar"]:
        yield "vocabulary", f"{facts['vocab_size']:,}"
        end = facts["eod_id"]
        yield "end token", "none" if end is None else f"{end} {decode([end])!r}" if decode else str(end)
        tokenizer = facts["tokenizer"]
        yield (
            "tokenizer",
            f"{tokenizer['path']}, sha256 {tokenizer['fingerprint'][:16]}" if tokenizer else "not recorded",
        )
        yield "entropy", f"{facts['unigram_entropy']:.4f} nats per token (unigram)"
    else:
        yield "sidecar", "none: vocabulary, tokenizer and checksums are not known"
    if facts["unigram_cross_entropy"] is not None:
        yield "to beat", f"{facts['unigram_cross_entropy']:.4f} nats per token, from the training corpus's frequencies"
    if facts["assistant_tokens"] is not None:
        yield "assistant", f"{facts['assistant_tokens']:,} tokens, {facts['assistant_tokens'] / facts['tokens']:.1%}"
    yield "fingerprint", facts["fingerprint"][:16]
    yield "mean length", f"{facts['mean_length']:,.0f} tokens"
    yield "percentiles", "   ".join(f"{share} %: {length:,}" for share, length in facts["length_percentiles"].items())
    yield "longest", f"document {facts['longest_document']}, {facts['longest_length']:,} tokens"


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    try:
        inspect(options)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever reads, such as head, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        return 128 + signal.SIGPIPE
    except (CorpusError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
