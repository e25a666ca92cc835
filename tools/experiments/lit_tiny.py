"""Long instruction tuning at toy size: a base model that has never seen a question learns to answer from long texts.

    python tools/experiments/lit_tiny.py --work runs/lit_tiny --json lit.json

in minutes on two CPU cores, by the commands that users have. make_long_qa.py plants facts in texts and asks for them;
preprocess_data.py makes corpora of plain texts and of conversations; pretrain_zebra.py trains a base model on the
texts, which repeat facts until it looks back for them, and then tunes it on the conversations
(examples/lit_tiny_cpu.yaml), packed and masked to the answers.

Measured before and after tuning is the exact match on held-out conversations, whose people and values no training
conversation has. An answer counts when each of its tokens, its end included, is the likeliest after the right ones
before it: greedy decoding would give it.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers

from megazebra.data.corpus.indexed_corpus import Corpus
from megazebra.data.prepare.encoders.tokenizer import EOD_TOKEN, save_tokenizer
from megazebra.data.prepare.long_qa import facts, names, questions
from megazebra.data.prepare.long_qa.conversation import INSTRUCTION
from megazebra.durable import write_atomically

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "examples" / "lit_tiny_cpu.yaml"
FILLER = [
    "the",
    "old",
    "river",
    "runs",
    "under",
    "a",
    "quiet",
    "hill",
    "and",
    "waits",
    "for",
    "grey",
    "morning",
    "light",
]
TEXTS, LINES, WORDS_IN_LINE = 50, 200, 12
TRAINING, HELD_OUT = 16000, 200  # conversations
LENGTH, FACTS = 136, 3  # tokens and facts in one; each fact is asked for
TIMES_SAID = 3  # each fact, in a text of the base model
BASE_STEPS = 2000
PLACES = len(names.PLACE_SIDES) * len(names.PLACE_STARTS) * len(names.PLACE_ENDS)
CHATML = ("<|im_start|>", "<|im_end|>")


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    work: Path = options.work
    if work.exists():
        raise SystemExit(f"{work} exists; choose another --work, or remove it first")
    make_data(work, options.seed)
    first, base, tuned = work / "first", work / "base", work / "tuned"
    write_first_weights(first, options.seed)
    steps = (f"--train.steps={BASE_STEPS}", f"--schedule.decay_steps={BASE_STEPS // 5}")
    train(base, work / "data/base", options.seed, f"--checkpoint.init_from={first}", *steps)
    train(tuned, work / "data/train", options.seed, f"--checkpoint.init_from={base}")
    asked = read_rows(work / "qa/validation.jsonl")
    results: dict[str, Any] = {"before": exact_match(base, asked, work), "after": exact_match(tuned, asked, work)}
    results["seed"], results["questions"] = options.seed, len(asked) * FACTS
    results["chance"] = {"place": 1 / PLACES, "number": 1 / len(names.NUMBERS)}
    print_table(results)
    if options.json:
        write_atomically(options.json, (json.dumps(results, indent=1) + "\n").encode())


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--work", type=Path, default=Path("runs/lit_tiny"), help="folder to make (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=1, help="of data and weights (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there")
    options = parser.parse_args(arguments)
    options.work = options.work.resolve()  # commands run in the repository's root, wherever the user is
    options.json = options.json and options.json.resolve()
    return options


def make_data(work: Path, seed: int) -> None:
    """Conversations, and the corpora base, train and held_out in work/data."""
    draw = random.Random(seed)
    (work / "texts").mkdir(parents=True)
    (work / "tokenizer").mkdir()
    for number in range(TEXTS):
        lines = (" ".join(draw.choices(FILLER, k=WORDS_IN_LINE)) for _ in range(LINES))
        (work / "texts" / f"{number:02}.txt").write_text("\n".join(lines) + "\n")
    save_tokenizer(small_tokenizer(), work / "tokenizer" / "tokenizer.json")
    tokenizer = ("--tokenizer", work / "tokenizer")
    run(
        "tools/make_long_qa.py", "--input", work / "texts", "--output", work / "qa", *tokenizer,
        "--lengths", LENGTH, "--facts", FACTS, "--questions", FACTS, "--kinds", "direct",
        "--train", TRAINING, "--validation", HELD_OUT, "--seed", seed,
    )  # fmt: skip
    texts = (json.dumps({"text": text}) + "\n" for text in base_texts(read_rows(work / "qa/train.jsonl"), draw))
    (work / "base.jsonl").write_text("".join(texts))
    run("tools/preprocess_data.py", "--input", work / "base.jsonl", "--output", work / "data/base", *tokenizer)
    for side, name in (("train", "train"), ("validation", "held_out")):
        run(
            "tools/preprocess_data.py", "--input", work / f"qa/{side}.jsonl", "--output", work / "data" / name,
            *tokenizer, "--chat-template", "chatml", "--validation-share", 0,
        )  # fmt: skip


def base_texts(conversations: list[dict[str, Any]], draw: random.Random) -> Iterator[str]:
    """Plain texts that say the facts of each training conversation again and again, in any order: what they repeat can
    be learned by looking back, and there is no question in them."""
    for conversation in conversations:
        said = [fact["sentence"] for question in conversation["long_qa"]["questions"] for fact in question["evidence"]]
        yield " ".join(sentence for _ in range(TIMES_SAID) for sentence in draw.sample(said, len(said)))


def small_tokenizer() -> Tokenizer:
    """Words, digits, and the parts that names are made of: no name is one token, so that none is new to the model."""
    attributes = (*facts.PLACES, *facts.NUMBERS, *facts.PEOPLE)
    written = [*FILLER, INSTRUCTION, *facts.STATEMENTS, *questions.QUESTIONS, "user assistant"]
    written += [attribute.name for attribute in attributes]
    words = re.findall(r"\w+|[^\w\s]", re.sub(r"\{\w+\}", " ", " ".join(written)))
    beginnings = [*names.GIVEN_NAMES, *names.SURNAME_STARTS, *names.PLACE_SIDES, *names.PLACE_STARTS, *"0123456789"]
    ends = [f"##{end}" for end in (*names.SURNAME_ENDS, *names.PLACE_ENDS)]
    special = ["[UNK]", EOD_TOKEN, *CHATML]
    vocabulary = dict.fromkeys([*special, *words, *beginnings, *ends])
    tokenizer = Tokenizer(models.WordPiece({token: id for id, token in enumerate(vocabulary)}, unk_token="[UNK]"))
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), digits])
    tokenizer.add_special_tokens(special[1:])
    return tokenizer


def write_first_weights(folder: Path, seed: int) -> None:
    """A model folder of random weights: as pretrain_zebra.py would draw them, but with embeddings of size one, with
    which so small a model finds out far sooner how to look something up. They are the output layer as well, so the last
    norm takes their size back."""
    import torch

    from megazebra.checkpoint.model_folder import ModelFolderWriter
    from megazebra.config import load_config
    from megazebra.models.build import build_model, model_runtime
    from megazebra.models.initialization import full_weights, initialize
    from megazebra.parallel.mesh import ParallelMesh

    config = load_config(CONFIG)
    mesh = ParallelMesh.build(config.parallel)
    model = build_model(config, mesh, model_runtime(config, torch.device("cpu")))
    initialize(model, config.model, seed, mesh.tp)
    weights = full_weights(model, mesh.tp)
    weights["model.embed_tokens.weight"] /= config.model.init_std
    weights["model.norm.weight"] *= config.model.init_std
    with ModelFolderWriter(folder, config.model) as writer:
        for name, weight in weights.items():
            writer.write(name, weight)


def train(run_dir: Path, data: Path, seed: int, *overrides: str) -> None:
    held_out = data / "validation" if (data / "validation.idx").exists() else data.parent / "held_out" / "train"
    run(
        "pretrain_zebra.py", "--config", CONFIG, f"--run.dir={run_dir}", f"--train.seed={seed}",
        f"--data.path={data / 'train'}", f"--data.validation_path={held_out}", *overrides,
    )  # fmt: skip


def exact_match(run_dir: Path, asked: list[dict[str, Any]], work: Path) -> dict[str, float]:
    """Shares of the held-out questions whose answer the run's model gives: all, and by what kind of thing is asked for;
    beside them the share of single tokens, which tells a model that has learned the form from one that has not."""
    import torch

    from megazebra.generate.loading import load_model
    from megazebra.labels import IGNORE_INDEX

    model = load_model(run_dir, "cpu", torch.float32)
    corpus = Corpus(work / "data/held_out/train")
    assert corpus.documents == len(asked), "a conversation was left out"
    right: dict[str, list[bool]] = {"all": []}
    tokens: list[bool] = []
    for number, conversation in enumerate(asked):
        line = torch.from_numpy(corpus.read(number))
        labels = torch.cat([line[1:], torch.tensor([IGNORE_INDEX])])
        _, hits = model(line[None], labels[None], reduction="scores")
        answers = zip(corpus.spans(number).tolist(), conversation["long_qa"]["questions"], strict=True)
        for (start, stop), question in answers:
            found = hits[0, start - 1 : stop - 1].bool()
            right["all"].append(bool(found.all()))
            right.setdefault(value_kind(question["answer"]), []).append(right["all"][-1])
            tokens += found.tolist()
    shares = {kind: sum(hit) / len(hit) for kind, hit in right.items()}
    return {**shares, "tokens": sum(tokens) / len(tokens)}


def value_kind(answer: str) -> str:
    return "number" if answer.isdigit() else "place"


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def print_table(results: dict[str, Any]) -> None:
    print(f"\nexact match on {results['questions']} held-out questions, seed {results['seed']}")
    print(f"{'':10}{'before':>10}{'after':>10}")
    for kind, after in results["after"].items():
        print(f"{kind:10}{results['before'][kind]:>10.1%}{after:>10.1%}")
    guesses = ", ".join(f"{share:.2%} of {kind} answers" for kind, share in results["chance"].items())
    print(f"a blind guess is right for {guesses}; any value of the text would be for {1 / FACTS:.0%} of all")


def run(*command: Any) -> None:
    print("\n$ python", *command, flush=True)
    subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, check=True)


if __name__ == "__main__":
    main()
