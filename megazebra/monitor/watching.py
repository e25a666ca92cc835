"""A run folder and what is known of it, put together."""

from __future__ import annotations

import time
from pathlib import Path

from rich.console import RenderableType

from megazebra.errors import UserError
from megazebra.monitor.follow import Follower
from megazebra.monitor.frame import frame
from megazebra.monitor.state import Plan, RunState


class Monitor:
    """Follows the run inside a `with` block. Raises UserError when there is no such folder."""

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise UserError(f"{folder} is no folder; give that of a run (run.dir)")
        self.folder = folder
        self.follower = Follower(folder / "metrics.jsonl")
        self.state = RunState(Plan.read(folder))

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *error: object) -> None:
        self.follower.close()

    def poll(self) -> None:
        """Take in what has been written since the last time."""
        rows, another_file = self.follower.poll()
        if another_file:  # the run has been started, perhaps again and with other steps
            self.state = RunState(Plan.read(self.folder))
        for row in rows:
            self.state.absorb(row)

    def frame(self, width: int, height: int) -> RenderableType:
        silent_for = self.state.silent_for(self.follower.written_at(), time.time())
        return frame(self.state, self.folder.resolve().name, silent_for, width, height)
