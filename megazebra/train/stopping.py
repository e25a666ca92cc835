"""The end of a run that comes from outside: a signal that says this machine will be taken away."""

from __future__ import annotations

import signal
import threading
from types import FrameType

import torch

from megazebra.launch import STOP_SIGNALS, stop_is_handled_elsewhere
from megazebra.parallel.collectives import all_reduce
from megazebra.parallel.mesh import Group


class StopRequest:
    """Whether a signal has asked this process to stop; training asks after every step.

    Signals count from `listen` on, when all ranks are connected: one that ended before would leave the others waiting.
    The first signal waits for the step and the checkpoint; a second one of the same kind ends the process at once.
    Outside of the main thread, where Python allows no handlers, nothing is ever requested.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def listen(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                signal.signal(number, self._note)
            stop_is_handled_elsewhere()

    def anywhere(self, world: Group, device: torch.device) -> signal.Signals | None:
        """The signal that any rank has received: all ranks call it together and stop after the same step."""
        number = torch.tensor([float(self.signal or 0)], device=device)
        largest = int(all_reduce(number, world, maximum=True, label="stop").item())
        return signal.Signals(largest) if largest else None

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number)
        signal.signal(number, signal.SIG_DFL)
