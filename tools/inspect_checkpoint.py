"""Show what a training checkpoint or a model folder holds: a tree of its weights with shapes, dtypes and norms.

python tools/inspect_checkpoint.py runs/zebra                            the run's latest training checkpoint
python tools/inspect_checkpoint.py runs/zebra/checkpoints/step_00000200 --with-optimizer
python tools/inspect_checkpoint.py runs/zebra --diff models/zebra        which weights differ, and by how much

All files are compared with their checksums first; then one weight after another is in memory. Exits with 1 when --diff
finds a difference, with 2 when a file is missing or damaged.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from byte_bar import byte_bar
from tqdm import tqdm

from megazebra.errors import UserError
from megazebra.launch import readable_errors

if TYPE_CHECKING:
    from megazebra.checkpoint.weights import Weights


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)

    from megazebra.checkpoint.reader import TrainingCheckpoint
    from megazebra.checkpoint.weights import open_weights  # torch takes seconds

    weights = open_weights(options.path)
    if options.with_optimizer and not isinstance(weights, TrainingCheckpoint):
        raise UserError(
            f"--with-optimizer: {options.path} is a model folder, without an optimizer's state; leave it out"
        )
    if options.diff:
        return print_differences(weights, open_weights(options.diff))
    print("\n".join(facts(weights)))
    if not options.dry_run:
        verify(weights)
    print_tree(weights, with_norms=not options.dry_run, with_optimizer=options.with_optimizer)
    return 0


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", metavar="PATH", type=Path, help="a run, one of its checkpoints, or a model folder")
    parser.add_argument("--with-optimizer", action="store_true", help="also norms of the optimizer's moments")
    parser.add_argument("--dry-run", action="store_true", help="read no weights: neither norms nor checksums")
    parser.add_argument("--diff", metavar="OTHER", type=Path, help="only name the weights that OTHER has otherwise")
    options = parser.parse_args(arguments)
    if options.diff and (options.with_optimizer or options.dry_run):
        parser.error("--diff reads all weights, and only weights: leave out --with-optimizer and --dry-run")
    if options.dry_run and options.with_optimizer:
        parser.error("--dry-run reads no weights, so there are no norms: leave out --with-optimizer")
    return options


def facts(weights: Weights) -> Iterator[str]:
    from megazebra.checkpoint.reader import TrainingCheckpoint

    yield str(weights.folder)
    if isinstance(weights, TrainingCheckpoint):
        progress, layout = weights.progress, weights.layout
        yield f"  progress    step {progress['step']:,}, {progress['samples']:,} samples, {progress['tokens']:,} tokens"
        yield (
            f"  layout      tp {layout['tensor']} x cp {layout['context']} x dp {layout['data']}, "
            f"ZeRO-{layout['zero_stage']}"
        )
        yield f"  training    {weights.config.optimizer.name}, {weights.config.train.precision}"
    files = list(weights.folder.glob("*.safetensors"))
    yield f"  files       {len(files)}, {sum(file.stat().st_size for file in files):,} bytes"
    yield f"  parameters  {sum(prod(weights.shape(name)) for name in weights.names):,}"


def verify(weights: Weights) -> None:
    total = sum(file.stat().st_size for file in weights.folder.glob("*.safetensors"))
    with byte_bar("verifying", total) as advance:
        weights.verify(advance)


def print_tree(weights: Weights, *, with_norms: bool, with_optimizer: bool) -> None:
    """A line for every weight under its layer; the norms of a line are read before it is printed."""
    labels = [label for label, _ in tree(weights.names)]
    label_width = max(map(len, labels))
    shape_width = max(len(str(list(weights.shape(name)))) for name in weights.names)
    for label, name in tree(weights.names):
        line = label
        if name is not None:
            dtype = str(weights.dtype(name)).removeprefix("torch.")
            line = f"{label:<{label_width}}  {list(weights.shape(name))!s:<{shape_width}}  {dtype}"
            if with_norms:
                line += "".join(f"  {what} {value:<11.5g}" for what, value in norms(weights, name, with_optimizer))
        print(line.rstrip(), flush=True)


def tree(names: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """Indented lines and the weight that each stands for; None for a layer or another part of the model."""
    above: list[str] = []
    for name in names:
        parts = name.split(".")
        split = len(parts) - (2 if parts[-1] in ("weight", "bias") else 1)
        parents, leaf = parts[:split], ".".join(parts[split:])
        for depth, parent in enumerate(parents):
            if above[: depth + 1] != parents[: depth + 1]:
                yield f"{'  ' * depth}{parent}", None
        yield f"{'  ' * len(parents)}{leaf}", name
        above = parents


def norms(weights: Weights, name: str, with_optimizer: bool) -> Iterator[tuple[str, float]]:
    from megazebra.checkpoint.reader import TrainingCheckpoint
    from megazebra.checkpoint.weights import norm

    yield "norm", norm(weights.tensor(name))
    if with_optimizer and isinstance(weights, TrainingCheckpoint):
        for state in weights.states(name):
            if state != "master":
                yield state, norm(weights.tensor(name, state))


def print_differences(one: Weights, other: Weights) -> int:
    from megazebra.checkpoint.weights import all_names, difference

    print(f"first   {one.folder}\nsecond  {other.folder}")
    verify(one)
    verify(other)
    names, different = all_names(one, other), 0
    with tqdm(names, unit="weight", desc="comparing", leave=False, disable=None) as bar:
        for name in bar:
            found = difference(name, one, other)
            if found:
                different += 1
                bar.write(f"{name}: {found}")
    print(f"{different} of {len(names)} weights differ" if different else f"all {len(names)} weights are equal")
    return 1 if different else 0


if __name__ == "__main__":
    with readable_errors():
        try:
            code = main()
        except BrokenPipeError:  # whoever reads, such as head, has had enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
            code = 128 + signal.SIGPIPE
        sys.exit(code)
