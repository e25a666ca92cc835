"""Long-context adaptation at toy size: what a Llama of 512 tokens loses at 2,048, and what adapting it brings back.

    python tools/experiments/lcat_tiny.py --work runs/lcat --ranks 2

in minutes on two CPU cores, by the commands that users have. pretrain_zebra.py trains a small Llama on the Python
standard library (examples/llama_tiny_cpu.yaml); merge_checkpoint.py and convert_hf.py make a Hugging Face Llama of it
and import that again as a GLLL model, as one would import a Llama from elsewhere; pretrain_zebra.py then adapts it
(examples/lcat_tiny_cpu.yaml) once with each way of stretching the rotary embedding.

Measured on held-out documents: the loss by position in pieces of 2,048 tokens, before (the Llama as it is, and switched
to GLLL with the rotary embedding stretched, untrained) and after; and the loss of pieces of 512 tokens. lcat.json holds
the numbers, lcat.png draws them.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megazebra.config.schema import ModelConfig
from megazebra.durable import write_atomically

ROOT = Path(__file__).parents[2]
SHORT, LONG = 512, 2048
BUCKETS = LONG // 128
KINDS: dict[str, dict[str, Any]] = {
    "PI": {"scaling": "linear", "original_max_position_embeddings": None},
    "YaRN": {"scaling": "yarn", "original_max_position_embeddings": SHORT},
    "ABF": {"scaling": "abf", "abf_theta": 100000.0, "factor": 1.0, "original_max_position_embeddings": None},
}
FACTORS = {"to_1k": 2.0, "to_2k": 4.0}  # of examples/lcat_tiny_cpu.yaml


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    work, data = options.work, options.data
    work.mkdir(parents=True, exist_ok=True)
    if not Path(f"{data}/train.bin").exists():
        run("tools/preprocess_data.py", "--input", "stdlib", "--glob", "*.py", "--output", data,
            "--train-tokenizer", 4096)  # fmt: skip
    llama = options.llama or work / "llama"
    if options.llama is None:
        train(options, "llama_tiny_cpu", llama, f"--data.path={data}/train")
    imported = convert(llama, work)
    results: dict[str, Any] = {"llama": measure(llama, data, options.samples), "adapted": {}, "switched": {}}
    for kind in KINDS:
        train(options, "lcat_tiny_cpu", work / kind, f"--checkpoint.init_from={imported}", *stage_overrides(kind, data))
        adapted = measure(work / kind, data, options.samples)
        results["adapted"][kind] = adapted
        results["switched"][kind] = measure(llama, data, options.samples, as_in=work / kind)
    print(*table(results), sep="\n")
    write_atomically(work / "lcat.json", (json.dumps(results, indent=1) + "\n").encode())
    write_atomically(work / "lcat.png", draw(results))
    print(f"\nwrote {work}: lcat.json, lcat.png")


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/lcat"), help="folder of runs and results")
    parser.add_argument("--data", type=Path, default=Path("data/stdlib"), help="corpora; made where they are missing")
    parser.add_argument(
        "--llama", type=Path, help="a run of examples/llama_tiny_cpu.yaml to begin with (default: train)"
    )
    parser.add_argument("--ranks", type=int, default=1, help="processes of a training (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=16, help="pieces of each length (default: %(default)s)")
    options = parser.parse_args(arguments)
    # Commands run in the repository's root, wherever the user is.
    options.work, options.data = options.work.resolve(), options.data.resolve()
    options.llama = options.llama and options.llama.resolve()
    return options


def convert(llama: Path, work: Path) -> Path:
    """The Llama as a GLLL model, by way of Hugging Face's format; what a run that was stopped has made is kept."""
    merged, exported, imported = work / "merged", work / "llama-hf", work / "imported"
    if imported.exists():
        return imported
    if not merged.exists():
        run("tools/merge_checkpoint.py", llama, merged)
    if not exported.exists():
        run("tools/convert_hf.py", "export", merged, exported)
    run("tools/convert_hf.py", "import", exported, imported, "--pattern", "GLLL", "--window", 128)
    return imported


def stage_overrides(kind: str, data: Path) -> list[str]:
    """What the stages of examples/lcat_tiny_cpu.yaml set for this way of stretching, and for these corpora."""
    overrides = []
    for stage, factor in FACTORS.items():
        rope = {"factor": factor, **KINDS[kind]}
        overrides.append(f"--stages.{stage}.model.rope_global={json.dumps(rope)}")
        overrides += [f"--stages.{stage}.data.sources.{source}.path={data}/train" for source in ("long", "short")]
    return overrides


def train(options: argparse.Namespace, example: str, run_dir: Path, *overrides: str) -> None:
    """Train or go on; a run that has ended says so and is left as it is."""
    arguments = [
        "pretrain_zebra.py", "--config", f"examples/{example}.yaml", f"--run.dir={run_dir}", *overrides,
        f"--data.validation_path={options.data}/validation", "--logging.interval=20",
    ]  # fmt: skip
    if options.ranks == 1:
        run(*arguments)
    else:
        launcher = Path(sys.executable).with_name("deepspeed")
        command = [launcher, "--log_level", "error", "--num_gpus", options.ranks, *arguments]
        subprocess.run([str(part) for part in command], cwd=ROOT, check=True)


def run(*command: Any) -> None:
    subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, check=True)


def measure(run_dir: Path, data: Path, samples: int, as_in: Path | None = None) -> dict[str, Any]:
    """Loss by position of long pieces, and of short ones. as_in: the run whose pattern and rotary embeddings these
    weights are given."""
    import torch

    from megazebra.checkpoint.weights import open_weights
    from megazebra.data.corpus.indexed_corpus import Corpus
    from megazebra.evaluate.positions import Pieces, PositionCell, equal_buckets
    from megazebra.evaluate.scoring import evaluate_model
    from megazebra.generate.loading import load_model

    config: ModelConfig = open_weights(as_in or run_dir).model
    model = load_model(run_dir, "cpu", torch.float32, specs=config.attention_specs())
    corpus = Corpus(f"{data}/validation")
    cells = [
        PositionCell(Pieces(corpus, LONG, samples, seed=1), equal_buckets(LONG - 1, BUCKETS)),
        PositionCell(Pieces(corpus, SHORT, 4 * samples, seed=1), [0, SHORT - 1]),
    ]
    *long, short = evaluate_model(model, model.mesh, torch.device("cpu"), cells)
    return {"starts": [row.start for row in long], "losses": [row.loss for row in long], "short": short.loss}


def table(results: dict[str, Any]) -> list[str]:
    """One line for each model: the loss of short pieces, and of long ones within and beyond the Llama's length."""

    def line(name: str, measured: dict[str, Any]) -> str:
        within = [loss for start, loss in zip(measured["starts"], measured["losses"], strict=True) if start < SHORT]
        beyond = measured["losses"][len(within) :]
        means = [sum(losses) / len(losses) for losses in (within, beyond)]
        change = measured["short"] / results["llama"]["short"] - 1
        return f"{name:<28}  {measured['short']:>9.4f}  {change:>+7.1%}  {means[0]:>9.4f}  {means[1]:>9.4f}"

    lines = [
        "", f"{'loss of held-out text':<28}  {SHORT:>9}  {'change':>7}  {f'0-{SHORT}':>9}  {f'{SHORT}-{LONG}':>9}",
        line("Llama", results["llama"]),
    ]  # fmt: skip
    lines += [line(f"GLLL, {kind}, untrained", measured) for kind, measured in results["switched"].items()]
    return [*lines, *(line(f"GLLL, {kind}, adapted", measured) for kind, measured in results["adapted"].items())]


def draw(results: dict[str, Any]) -> bytes:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.6), layout="constrained")
    middle = LONG // BUCKETS / 2
    places = [start + middle for start in results["llama"]["starts"]]
    axes.plot(places, results["llama"]["losses"], color="#333333", linewidth=2, label="Llama of 512 tokens, as it is")
    for kind, color in zip(KINDS, ("#c0392b", "#2980b9", "#27ae60"), strict=True):
        axes.plot(places, results["switched"][kind]["losses"], ":", color=color, label=f"GLLL and {kind}, untrained")
        axes.plot(places, results["adapted"][kind]["losses"], "-", color=color, label=f"GLLL and {kind}, adapted")
    axes.axvline(SHORT, color="#999999", linewidth=1, linestyle="--")
    axes.set(xlabel="position in the document", ylabel="loss (nats per token)", xlim=(0, LONG))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=130, format="png")
    pyplot.close(figure)
    return picture.getvalue()


if __name__ == "__main__":
    main()
