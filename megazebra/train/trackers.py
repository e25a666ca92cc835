"""Where metrics go beside the file: TensorBoard and Weights & Biases, both optional extras, rank 0 only."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Protocol

from megazebra.config.schema import Config

Row = dict[str, Any]
_INIT_TIMEOUT_S = 20


class Tracker(Protocol):
    def log(self, row: Row) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in the run folder's `tensorboard`."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"))

    def log(self, row: Row) -> None:
        for name, value in _numbers(row).items():
            self.writer.add_scalar(f"{row['kind']}/{name}", value, row["step"])

    def close(self) -> None:
        self.writer.close()


class Wandb:
    """A run of Weights & Biases, offline where there is no key or no answer: tracking never ends training."""

    def __init__(self, config: Config) -> None:
        import wandb

        folder = Path(config.run.dir)
        options: dict[str, Any] = {
            "project": config.logging.wandb.project,
            "name": config.logging.wandb.name or folder.name,
            "dir": str(folder),
            "config": config.model_dump(mode="json"),
            "settings": wandb.Settings(init_timeout=_INIT_TIMEOUT_S, silent=True),
        }
        if not _has_key():
            os.environ.setdefault("WANDB_MODE", "offline")
        try:
            self.run = wandb.init(**options)
        except Exception:  # wandb raises many kinds for a network that does not answer
            self.run = wandb.init(mode="offline", **options)

    def log(self, row: Row) -> None:
        self.run.log({f"{row['kind']}/{name}": value for name, value in _numbers(row).items()}, step=row["step"])

    def close(self) -> None:
        self.run.finish()


def open_trackers(config: Config) -> list[Tracker]:
    """The trackers that `logging` asks for.

    Raises ValueError, naming the key and the extra to install, when one's package is absent.
    """
    trackers: list[Tracker] = []
    try:
        if config.logging.tensorboard:
            trackers.append(TensorBoard(Path(config.run.dir)))
    except ImportError as error:
        raise ValueError(f"logging.tensorboard=true needs `pip install 'megazebra[tensorboard]'` ({error})") from error
    try:
        if config.logging.wandb.enabled:
            trackers.append(Wandb(config))
    except ImportError as error:
        raise ValueError(f"logging.wandb.enabled=true needs `pip install 'megazebra[wandb]'` ({error})") from error
    return trackers


def _numbers(row: Row) -> dict[str, float]:
    return {k: v for k, v in row.items() if isinstance(v, int | float) and k != "step"}


def _has_key() -> bool:
    netrc = Path.home() / ".netrc"
    return "WANDB_API_KEY" in os.environ or (netrc.exists() and "api.wandb.ai" in netrc.read_text())
