"""One self-contained HTML page about a run: losses, speed, memory, checkpoints, configuration, evaluations.

    python tools/report.py runs/zebra                                    writes runs/zebra/report.html
    python tools/report.py runs/zebra --evaluation runs/zebra/evaluation --output zebra.html

The page needs no network and runs no scripts: mail it, or open it anywhere. A run that is under way serves as well.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from megazebra.durable import write_atomically
from megazebra.launch import readable_errors
from megazebra.report.evaluations import Evaluation
from megazebra.report.page import page
from megazebra.report.run import Run


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    run = Run.open(options.run)
    evaluations = [Evaluation.open(path) for path in options.evaluation]
    output: Path = options.output or options.run / "report.html"
    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(output, page(run, evaluations).encode())
    print(f"wrote {output} ({output.stat().st_size / 1000:,.0f} kB)")


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN", type=Path, help="folder of a run (run.dir)")
    parser.add_argument(
        "--evaluation", metavar="DIR", type=Path, action="extend", nargs="+", default=[],
        help="output folders of tools/evaluate.py, or their evaluation.json; repeatable",
    )  # fmt: skip
    parser.add_argument("--output", metavar="FILE", type=Path, help="the page (default: RUN/report.html)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    with readable_errors():
        main()
