"""Make long question-answering conversations of any texts, offline: facts planted in long documents, and questions.

    make_long_qa.py --input stdlib --tokenizer Qwen3-8B/ --lengths 8000 30000 --train 2000 --output data/long_qa
    preprocess_data.py --input data/long_qa/train.jsonl --tokenizer Qwen3-8B/ --chat-template tokenizer \
        --validation-share 0 --output data/long_qa_tokens

writes OUTPUT/train.jsonl and OUTPUT/validation.jsonl: `messages`, and under `long_qa` each question's kind, answer,
depth and distance. Names and values of the validation conversations stand in no training conversation's facts, whatever
the seed; their texts are other documents, where the input has several. The same arguments give the same bytes.

Kinds of questions: direct (one fact), compare (whose number is larger), chain (the mentor of A is B, the home town of B
is C), list (all with the same home town), unknown (the text does not say).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megazebra.data.errors import CorpusError
from megazebra.data.prepare.long_qa.build import LongQA, write_json_lines
from megazebra.data.prepare.long_qa.conversation import Wanted
from megazebra.data.prepare.long_qa.preview import preview
from megazebra.data.prepare.long_qa.questions import KINDS


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--input",
        action="extend",
        nargs="+",
        required=True,
        metavar="PATH",
        help="texts: folders, files, .jsonl, .parquet, or the word stdlib; repeatable",
    )
    add("--glob", action="append", default=[], metavar="PATTERN", help="names of files to take from folders")
    add("--text-key", default="text", metavar="KEY", help="where a record has its text (default: %(default)s)")
    add("--output", type=Path, metavar="FOLDER", help="where train.jsonl and validation.jsonl go")
    add("--dry-run", action="store_true", help="print the first training conversation; write nothing")
    add("--train", type=int, default=1000, metavar="N", help="training conversations (default: %(default)s)")
    add("--validation", type=int, default=100, metavar="N", help="held-out conversations (default: %(default)s)")
    add(
        "--tokenizer",
        metavar="PATH",
        help="tokenizer.json, a folder with one, or the word bytes: lengths are in its tokens (default: characters)",
    )
    add(
        "--lengths",
        type=int,
        nargs="+",
        default=[8000],
        metavar="N",
        help="lengths of a conversation; the chat template's own tokens come on top (default: 8000)",
    )
    add("--kinds", nargs="+", choices=tuple(KINDS), default=list(KINDS), help="of questions (default: all)")
    add("--questions", type=int, default=1, metavar="N", help="questions in one conversation (default: %(default)s)")
    add(
        "--facts",
        type=int,
        default=8,
        metavar="N",
        help="facts in one text, those that no question needs included (default: %(default)s)",
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--depths",
        type=float,
        nargs="+",
        default=[],
        metavar="SHARE",
        help="where a question's first fact lies, 0 (beginning of the text) to 1 (default: anywhere)",
    )
    where.add_argument(
        "--distances",
        type=int,
        nargs="+",
        default=[],
        metavar="N",
        help="instead, how far it lies before the end of the question",
    )
    add(
        "--held-out-share",
        type=float,
        default=0.2,
        metavar="SHARE",
        help="of names, values and texts that training never sees (default: %(default)s)",
    )
    add("--seed", type=int, default=1234, help="(default: %(default)s)")  # fmt: skip
    parsed = parser.parse_args(arguments)
    if parsed.output is None and not parsed.dry_run:
        parser.error("give --output FOLDER, or --dry-run")
    if min(parsed.train, parsed.validation) < 1:
        parser.error(f"--train {parsed.train} --validation {parsed.validation}: give at least 1 of each")
    return parsed


def main(arguments: Sequence[str] | None = None) -> int:
    parsed = parse_arguments(arguments)
    job = LongQA(
        inputs=tuple(parsed.input),
        globs=tuple(parsed.glob),
        text_key=parsed.text_key,
        tokenizer=parsed.tokenizer,
        held_out_share=parsed.held_out_share,
        seed=parsed.seed,
        wanted=Wanted(
            lengths=tuple(parsed.lengths),
            kinds=tuple(parsed.kinds),
            questions=parsed.questions,
            facts=parsed.facts,
            depths=tuple(parsed.depths),
            distances=tuple(parsed.distances),
        ),
    )
    try:
        if parsed.dry_run:
            print(preview(next(job.conversations(validation=False))))
            return 0
        for side, count in (("train", parsed.train), ("validation", parsed.validation)):
            conversations = islice(job.conversations(validation=side == "validation"), count)
            path = parsed.output / f"{side}.jsonl"
            made = write_json_lines(path, shown(conversations, count, side))
            print(f"wrote {path}: {made:,} conversations")
    except (CorpusError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def shown(conversations: Iterator[dict[str, Any]], count: int, side: str) -> Iterator[dict[str, Any]]:
    """The same conversations, with a bar on a terminal."""
    return iter(tqdm(conversations, total=count, desc=side, unit="conversation", leave=False, disable=None))


if __name__ == "__main__":
    sys.exit(main())
