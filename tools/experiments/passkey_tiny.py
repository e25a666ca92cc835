"""What global layers are for: models of three patterns learn to find a passkey, or don't.

    python tools/experiments/passkey_tiny.py --work runs/passkey

in minutes on two CPU cores. Each sequence hides four symbols in the first quarter of its filler and asks for them at
its end, 90 or more positions later. GGGG and GLLL can look there; the windows of LLLL reach back 28 positions, so that
it can only guess. pretrain_zebra.py trains on questions, of which the answers alone are learned, and evaluates others
on its way, by the task `passkey` of megazebra/evaluate. passkey.json holds the numbers.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megazebra.data.corpus.corpus_writer import CorpusWriter
from megazebra.durable import write_atomically
from megazebra.evaluate.recall.answers import AnswerCell
from megazebra.evaluate.recall.token_tasks import Alphabet, token_tasks
from megazebra.train.metrics import Row, read_metrics

ROOT = Path(__file__).parents[2]
LENGTH, VOCABULARY, DEEPEST = 128, 32, 0.2
SETTINGS = {
    "model.num_layers": 4,
    "model.hidden_size": 64,
    "model.ffn_hidden_size": 128,
    "model.num_attention_heads": 4,
    "model.vocab_size": VOCABULARY,
    "model.max_position_embeddings": LENGTH,
    "model.window": 8,
    "model.init_std": 0.125,
    "train.micro_batch_size": 32,
    "train.global_batch_size": 32,
    "train.precision": "fp32",
    "train.guard.enabled": "false",
    "parallel.zero_stage": 0,
    "optimizer.lr": 4e-3,
    "optimizer.weight_decay": 0.01,
    "schedule.kind": "linear",
    "schedule.warmup_steps": 30,
    "data.seq_len": LENGTH,
    "evaluation.tasks": "[passkey]",
    "evaluation.interval": 100,
    "evaluation.samples": 64,
    "evaluation.depths": f"[0.0, 0.1, {DEEPEST}]",
    "logging.interval": 50,
}


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    corpus = options.work / "questions"
    write_questions(corpus, options.questions, options.seed)
    results = {}
    for pattern in options.patterns:
        run_dir = options.work / pattern
        settings = {
            **SETTINGS,
            "model.pattern": pattern,
            "train.steps": options.steps,
            "train.seed": options.seed,
            "data.path": corpus,
            "run.dir": run_dir,
        }
        overrides = [f"--{key}={value}" for key, value in settings.items()]
        subprocess.run([sys.executable, "pretrain_zebra.py", *overrides], cwd=ROOT, check=True)
        rows = [row for row in read_metrics(run_dir / "metrics.jsonl") if row["kind"] == "evaluation"]
        results[pattern] = last_of(rows)
    chance = 1 / len(Alphabet(VOCABULARY).symbols)
    print(f"\n{'pattern':<10}{'right tokens':>14}{'exact match':>14}   (a guess: {chance:.1%} of tokens)")
    for pattern, shares in results.items():
        print(f"{pattern:<10}{shares['tokens']:>14.1%}{shares['exact']:>14.1%}")
    content = {"seed": options.seed, "steps": options.steps, "chance_of_a_token": chance, "patterns": results}
    write_atomically(options.work / "passkey.json", (json.dumps(content, indent=1) + "\n").encode())


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/passkey"), help="folder of data, runs and results")
    parser.add_argument("--patterns", nargs="+", default=["GGGG", "GLLL", "LLLL"], help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=1200, help="updates of each model (default: %(default)s)")
    parser.add_argument("--questions", type=int, default=40000, help="to learn from (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of questions and weights (default: %(default)s)")
    options = parser.parse_args(arguments)
    options.work = options.work.resolve()  # commands run in the repository's root, wherever the user is
    return options


def write_questions(prefix: Path, count: int, seed: int) -> None:
    """A corpus of `count` questions, other ones than the evaluation asks, with their answers marked to be learned."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    depths = np.random.default_rng(seed).uniform(0, DEEPEST, count)
    task = token_tasks(VOCABULARY)["passkey"]
    with CorpusWriter(prefix, vocab_size=VOCABULARY, with_spans=True) as writer:
        for number, depth in enumerate(depths.tolist()):
            question = AnswerCell("passkey to learn", task, count, LENGTH, depth, seed).question(number)
            answer = np.flatnonzero(question.is_answer)
            writer.add_document(question.tokens, [[answer[0], answer[-1] + 1]])


def last_of(rows: Sequence[Row]) -> dict[str, float]:
    """The shares of right tokens and right answers over all depths, when training had ended."""
    last = [row for row in rows if row["step"] == rows[-1]["step"]]
    return {
        "tokens": sum(row["token_accuracy"] for row in last) / len(last),
        "exact": sum(row["exact_match"] for row in last) / len(last),
    }


if __name__ == "__main__":
    main()
