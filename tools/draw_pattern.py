"""Draw which keys each layer of a pattern sees: the picture in the README.

python tools/draw_pattern.py --pattern GLLL --window 8 --documents 32 --output docs/pattern.png
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path

import matplotlib
import torch

from megazebra.attention.packing import Packing
from megazebra.attention.reference import visible
from megazebra.config.schema import ModelConfig
from megazebra.durable import write_atomically
from megazebra.plan.flops import attention_pairs

COLORS = {"global": "#1f3a5f", "local": "#c8553d"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pattern", default="GLLL", help="G and L, one group")
    parser.add_argument("--window", type=int, default=8, help="keys a local query sees, itself included")
    parser.add_argument("--documents", type=int, nargs="+", default=[32], help="lengths of the packed documents")
    parser.add_argument("--output", type=Path, required=True, help="PNG to write")
    arguments = parser.parse_args()
    draw(arguments.pattern, arguments.window, arguments.documents, arguments.output)


def draw(pattern: str, window: int, documents: list[int], output: Path) -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.colors import ListedColormap

    specs = ModelConfig(num_layers=len(pattern), pattern=pattern, window=window).attention_specs()
    length = sum(documents)
    packing = Packing.from_document_lengths([documents])
    figure, row = pyplot.subplots(
        1, len(specs), figsize=(2.5 * len(specs), 2.9), layout="constrained", squeeze=False, sharey=True
    )
    for number, (axes, spec) in enumerate(zip(row[0], specs, strict=True)):
        seen = visible(length, length, spec.window, packing, torch.device("cpu"))[0]
        pairs = attention_pairs(documents, spec.window)
        assert int(seen.sum()) == pairs
        axes.imshow(seen, cmap=ListedColormap(["#f2f0eb", COLORS[spec.kind]]), interpolation="nearest")
        axes.set_title(f"layer {number}: {spec.kind}\n{pairs} of {length * (length + 1) // 2} pairs", fontsize=9)
        axes.set_xlabel("key", fontsize=8)
        axes.set(xticks=[], yticks=[])
    row[0][0].set_ylabel("query", fontsize=8)
    output.parent.mkdir(parents=True, exist_ok=True)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=110, format="png")
    write_atomically(output, picture.getvalue())


if __name__ == "__main__":
    main()
