"""A live view of a run in the terminal: loss, speed, memory, communication, validation, checkpoints.

    python tools/monitor.py runs/zebra          until the run is finished, or Ctrl-C
    python tools/monitor.py runs/zebra --once   one picture, for scripts and slow connections

It reads the run folder alone, so it may run on any machine that sees it. Needs `pip install 'megazebra[monitor]'`.
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from megazebra.errors import UserError
from megazebra.launch import readable_errors


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    if importlib.util.find_spec("rich") is None:
        raise UserError("the package rich is missing; pip install 'megazebra[monitor]'")
    from rich.console import Console
    from rich.live import Live

    from megazebra.monitor.watching import Monitor

    # Names in the files are text, whatever rich could read into them.
    console = Console(markup=False, highlight=False, emoji=False)
    with Monitor(options.run) as monitor:
        monitor.poll()
        if not options.once:
            with suppress(KeyboardInterrupt), Live(console=console, screen=True, auto_refresh=False) as live:
                while not monitor.state.finished():
                    live.update(monitor.frame(*console.size), refresh=True)
                    time.sleep(options.interval)
                    monitor.poll()
        console.print(monitor.frame(*console.size))


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN", type=Path, help="folder of a run (run.dir)")
    parser.add_argument("--once", action="store_true", help="print one picture and end")
    parser.add_argument("--interval", metavar="S", type=_positive, default=2.0, help="seconds between two (default: 2)")
    return parser.parse_args(arguments)


def _positive(text: str) -> float:
    seconds = float(text)
    if not seconds > 0:
        raise argparse.ArgumentTypeError(f"{text} is no positive number of seconds")
    return seconds


if __name__ == "__main__":
    with readable_errors():
        main()
