"""How well a model reads: loss by position and context, recall by depth and length, a RULER-style set.

python tools/evaluate.py runs/zebra --tasks positions,contexts,passkey,ruler --lengths 1k,2k --data data/books/test \\
    --output evaluations/zebra
deepspeed --num_gpus 8 tools/evaluate.py runs/zebra --parallel.context=8 --tasks passkey --lengths 32k,128k --output DIR

MODEL is a run's folder (its latest checkpoint), one of its checkpoints, or a model folder. --parallel.* and
--train.attention_backend are those of training, whatever layout the model was trained under; other keys of a
configuration are refused.

positions: loss by position in pieces of held-out documents. contexts: loss of the same last tokens behind contexts of
different lengths. passkey, kv, copy: exact match by depth and length of the answer. ruler: needles, variable tracking,
common and frequent words. Answers are scored teacher-forced, which for exact match is the same as greedy generation.
With --bare-tokens, passkey, kv and copy are made of token ids alone, which only a model trained on such can answer.

Writes evaluation.json and pictures into the output folder.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from option_types import count

from megazebra import __version__
from megazebra.config import Config, load_config, parse_command_line
from megazebra.config.schema import ModelConfig
from megazebra.config.yaml_source import to_yaml
from megazebra.errors import UserError
from megazebra.evaluate.plan import TASKS, TEXT_TASKS, Plan
from megazebra.evaluate.recall.filler import Filler
from megazebra.evaluate.recall.texts import Encoder
from megazebra.launch import complete_environment, readable_errors, world_size

if TYPE_CHECKING:
    from megazebra.checkpoint.weights import Weights
    from megazebra.evaluate.results import Row

UNITS = {"k": 2**10, "m": 2**20}
OVERRIDES = ("parallel.", "train.attention_backend=")  # how an override begins that is taken


def main(arguments: Sequence[str] | None = None) -> None:
    complete_environment()
    options, overrides = parse_arguments(arguments)

    import torch  # takes seconds: after mistakes on the command line have shown

    from megazebra.checkpoint.weights import open_weights
    from megazebra.context.choice import resolve_specs
    from megazebra.evaluate.charts import draw_all
    from megazebra.evaluate.results import save_results, table
    from megazebra.evaluate.scoring import evaluate_model
    from megazebra.generate.loading import load_model
    from megazebra.parallel.mesh import ParallelMesh
    from megazebra.train.engine import start_deepspeed
    from megazebra.train.session import own_device

    weights = open_weights(options.model)
    device = own_device()
    dtype = getattr(torch, options.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    config = configuration(weights.model, overrides, options.lengths, "bf16" if dtype == torch.bfloat16 else "fp32")
    plan, about = make_plan(options, weights)
    cells = plan.cells()  # asks for what is missing before the model is loaded
    if world_size() > 1:
        start_deepspeed(device, config.parallel.timeout_s)
    mesh = ParallelMesh.build(config.parallel, device)
    model = load_model(
        options.model, device, dtype, config.train.attention_backend, mesh,
        specs=resolve_specs(config), sequence_parallel=config.parallel.sequence_parallel and mesh.tp.size > 1,
    )  # fmt: skip
    # pictures: none before all is drawn. What an earlier evaluation left in the folder is not of these numbers.
    about |= {
        "pictures": [],
        "layout": mesh.describe(),
        "dtype": str(dtype).removeprefix("torch."),
        "device": device.type,
    }
    speaks = mesh.world.rank == 0
    rows: list[Row] = []
    if speaks:
        print(f"model    {weights.folder}", f"kernels  {model.runtime.backend.reason}", sep="\n")
        print(f"layout   {about['layout']}, {about['dtype']}, {device.type}", flush=True)
        options.output.mkdir(parents=True, exist_ok=True)
    with progress_bar(sum(cell.samples for cell in cells), speaks) as bar:

        def keep(found: list[Row]) -> None:
            rows.extend(found)
            bar.update(found[0].samples)
            if speaks:  # as it comes: an evaluation of long texts takes its time
                save_results(options.output / "evaluation.json", rows, about)

        evaluate_model(model, mesh, device, cells, batch_tokens=options.batch_tokens, on_cell=keep)
    if speaks:
        for group in by_schema(rows):
            print("", *table(group), sep="\n")
        about["pictures"] = [path.name for path in draw_all(rows, options.output)]
        save_results(options.output / "evaluation.json", rows, about)
        print(f"\nwrote {options.output}: {', '.join(['evaluation.json', *about['pictures']])}")
    if world_size() > 1:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def parse_arguments(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Our own options, and `section.key=value` for the configuration.

    Raises UserError for keys that are not of the layout or the kernels.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("model", type=Path, metavar="MODEL", help="run, checkpoint or model folder")
    parser.add_argument(
        "--tasks", type=names, default=["passkey"], metavar="A,B", help=f"of {', '.join(TASKS)} (default: passkey)"
    )
    parser.add_argument(
        "--lengths", type=token_counts, default=[1024], metavar="1k,2k", help="tokens of sequences (default: 1k)"
    )
    parser.add_argument(
        "--depths", type=percentages, default=[0, 0.25, 0.5, 0.75, 1], metavar="0,50,100",
        help="percent of the text before the answer (default: 0,25,50,75,100)",
    )  # fmt: skip
    parser.add_argument("--samples", type=count, default=20, metavar="N", help="of each cell (default: %(default)s)")
    parser.add_argument("--data", metavar="PREFIX", help="held-out corpus, for positions and contexts")
    parser.add_argument(
        "--contexts", type=token_counts, metavar="128,1k", help="tokens before the last ones (default: the lengths)"
    )
    parser.add_argument(
        "--final", type=count, default=128, metavar="N",
        help="how many last tokens the task contexts scores (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--buckets", type=count, metavar="N", help="equal buckets of positions (default: octaves)")
    level = parser.add_mutually_exclusive_group()
    level.add_argument(
        "--tokenizer", type=Path, metavar="FILE",
        help="tokenizer.json, or a folder with one (default: the model's, else that of the run's corpus)",
    )  # fmt: skip
    level.add_argument("--bare-tokens", action="store_true", help="tasks of token ids, for models trained on them")
    parser.add_argument(
        "--filler", type=Path, metavar="FILE", help="text to hide answers in (default: our own sentences)"
    )
    parser.add_argument("--seed", type=seed, default=1234, metavar="N", help="of the questions (default: %(default)s)")
    parser.add_argument(
        "--batch-tokens", type=count, default=16384, metavar="N", help="of a forward pass (default: %(default)s)"
    )
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="(default: bfloat16 on GPUs, float32 on CPUs)")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for the results")
    options, others = parser.parse_known_args(arguments)
    given = parse_command_line(others)
    # The weights decide what the model is: with other settings another one would be evaluated under its name.
    refused = [override for override in given.overrides if not override.startswith(OVERRIDES)]
    files = {"config": given.config_path, "deepspeed_config": given.deepspeed_config_path, "stage": given.stage}
    refused += [f"{name}={value}" for name, value in files.items() if value is not None]
    if refused:
        raise UserError(
            f"--{refused[0]} has no place in an evaluation, which takes the model as it is; leave it out (beside the "
            "options of --help there are --parallel.KEY=VALUE and --train.attention_backend=NAME)"
        )
    return options, given.overrides


def names(text: str) -> list[str]:
    found = [name for name in text.split(",") if name]
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} names nothing; give at least one")
    return found


def seed(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} is negative; give 0 or more")
    return value


def token_counts(text: str) -> list[int]:
    """'512,1k,128k' as numbers; k is 1,024."""
    return [count(part.rstrip("kKmM")) * UNITS.get(part[-1:].lower(), 1) for part in names(text)]


def percentages(text: str) -> list[float]:
    return [float(part.rstrip("%")) / 100 for part in names(text)]


def configuration(model: ModelConfig, overrides: list[str], lengths: Sequence[int], precision: str) -> Config:
    """A run's configuration around the model, for its layout and kernels."""
    # Sequences beyond what the model was made for are what an evaluation is for: positions are computed, not looked up.
    seq_len = min(max(lengths), model.max_position_embeddings)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "config.yaml")
        path.write_text(to_yaml({"model": model.model_dump(mode="json")}))
        return load_config(path, [f"data.seq_len={seq_len}", f"train.precision={precision}", *overrides])


def make_plan(options: argparse.Namespace, weights: Weights) -> tuple[Plan, dict[str, Any]]:
    """What to evaluate, and what evaluation.json says of it."""
    from megazebra.data.corpus.indexed_corpus import Corpus

    model = weights.model
    corpus = Corpus(options.data, vocab_size=model.vocab_size, field="--data") if options.data else None
    encoder, tokenizer = None, None
    if not options.bare_tokens and any(task not in TEXT_TASKS for task in options.tasks):
        encoder, tokenizer = open_encoder(options, model)
    plan = Plan(
        tasks=options.tasks,
        lengths=options.lengths,
        depths=options.depths,
        samples=options.samples,
        contexts=options.contexts,
        final=options.final,
        buckets=options.buckets,
        seed=options.seed,
        vocab_size=model.vocab_size,
        corpus=corpus,
        encoder=encoder,
        filler=Filler.from_file(options.filler) if options.filler else Filler(),
    )
    about = {
        "megazebra": __version__,
        "model": str(weights.folder),
        "pattern": model.pattern,
        "window": model.window,
        "max_position_embeddings": model.max_position_embeddings,
        "seed": options.seed,
        "questions": "bare tokens" if encoder is None else "text",
        "tokenizer": tokenizer,
        "filler": str(options.filler) if options.filler else None,
        "data": {"path": corpus.prefix, "fingerprint": corpus.fingerprint} if corpus else None,
    }
    return plan, about


def open_encoder(options: argparse.Namespace, model: ModelConfig) -> tuple[Encoder, str]:
    """What makes questions of text, and the file of its tokenizer."""
    from megazebra.data.prepare.encoders.tokenizer import load_tokenizer, vocab_size
    from megazebra.generate.text import find_tokenizer

    try:
        file = find_tokenizer(options.model, options.tokenizer)
    except UserError as error:
        raise UserError(f"{error}; or ask with bare token ids (--bare-tokens)") from error
    if file.path.suffix != ".json":
        raise UserError(f"questions are marked in the text, which {file.path} cannot; give a tokenizer.json")
    tokenizer = load_tokenizer(file.path)
    if vocab_size(tokenizer) > model.vocab_size:
        raise UserError(
            f"{file.path} has {vocab_size(tokenizer):,} tokens, model.vocab_size is {model.vocab_size:,}; "
            "name the model's own with --tokenizer"
        )
    return Encoder(tokenizer, special_tokens=file.specials), str(file.path)


def by_schema(rows: Sequence[Row]) -> Iterator[list[Row]]:
    """Rows of one table: those that fill the same columns, RULER's tasks together."""
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        ruler = row.depth is None and row.exact_match is not None
        groups.setdefault("ruler" if ruler else row.task, []).append(row)
    yield from groups.values()


def progress_bar(samples: int, shown: bool) -> Any:
    from tqdm import tqdm

    return tqdm(total=samples, unit=" samples", desc="evaluating", leave=False, disable=None if shown else True)


if __name__ == "__main__":
    with readable_errors():
        main()
