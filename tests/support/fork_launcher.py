"""A launcher whose ranks start quickly: it imports torch and DeepSpeed once and forks them.

    python fork_launcher.py RANKS PORT pretrain_zebra.py --config ...

It ends all ranks when one has failed, with the exit code of that one, as DeepSpeed's launcher does, and hands signals
on to them, as srun does.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType

sys.path.insert(0, str(Path(__file__).parents[1]))


def main() -> None:
    ranks, port = int(sys.argv[1]), int(sys.argv[2])
    import support.deepspeed_preload  # noqa: F401
    from support.ranks import run_rank

    children = {}
    for rank in range(ranks):
        if (pid := os.fork()) == 0:
            run_rank(rank, ranks, port, sys.argv[3:], None, ())
            return
        children[pid] = rank

    def hand_on(number: int, frame: FrameType | None) -> None:
        for pid in children:
            os.kill(pid, number)

    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, hand_on)
    while children:
        pid, status = os.wait()
        del children[pid]
        code = os.waitstatus_to_exitcode(status)
        if code:
            time.sleep(0.5)  # the others' messages
            for other in children:
                with suppress(ProcessLookupError):
                    os.kill(other, signal.SIGKILL)
            sys.exit(code if code > 0 else 128 - code)


if __name__ == "__main__":
    main()
