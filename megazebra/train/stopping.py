"""The end of a run that comes from outside: a signal that says this machine will be taken away."""

from __future__ import annotations

import signal
import threading
from types import FrameType

import torch

from megazebra.parallel.collectives import all_reduce
from megazebra.parallel.mesh import Group

# Slurm sends SIGTERM before it preempts a job, and with `#SBATCH --signal=USR1@300` SIGUSR1 before its time is over.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Whether a signal has asked this process to stop; training asks after every step.

    The first signal waits for the step and the checkpoint; a second one of the same kind ends the process at once.
    Outside of the main thread, where Python allows no handlers, nothing is ever requested.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                signal.signal(number, self._note)

    def anywhere(self, world: Group, device: torch.device) -> signal.Signals | None:
        """The signal that any rank has received: all ranks call it together and stop after the same step."""
        number = torch.tensor([float(self.signal or 0)], device=device)
        largest = int(all_reduce(number, world, maximum=True, label="stop").item())
        return signal.Signals(largest) if largest else None

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number)
        signal.signal(number, signal.SIG_DFL)
