"""Where metrics go beside the file, rank 0 only: TensorBoard and Weights & Biases, both optional extras; Prometheus."""

from __future__ import annotations

import importlib.util
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from megazebra.config.schema import Config
from megazebra.durable import write_atomically
from megazebra.launch import rank
from megazebra.train.metrics import identity_of
from megazebra.train.prometheus import Prometheus

Row = dict[str, Any]
_INIT_TIMEOUT_S = 20


class Tracker(Protocol):
    def log(self, row: Row) -> None: ...

    def close(self, failed: bool) -> None: ...


class TensorBoard:
    """Event files in the run folder's `tensorboard`; what a resumed run does again is purged."""

    def __init__(self, folder: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1)

    def log(self, row: Row) -> None:
        for name, value in numbers_of(row).items():
            self.writer.add_scalar(name, value, row["step"])

    def close(self, failed: bool) -> None:
        self.writer.close()


class Wandb:
    """A run of Weights & Biases, offline where there is no key or no answer. A resumed run keeps its id."""

    def __init__(self, config: Config) -> None:
        import wandb

        folder = Path(config.run.dir)
        id_file = folder / "wandb_id"
        if not id_file.exists():
            write_atomically(id_file, uuid.uuid4().hex[:12].encode())
        options: dict[str, Any] = {
            "project": config.logging.wandb.project,
            "name": config.logging.wandb.name or folder.name,
            "id": id_file.read_text().strip(),
            "resume": "allow",
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
        # W&B's own step only grows, and drops what is told later of an earlier one: that a checkpoint is complete, and
        # the steps that a resumed run makes again.
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")

    def log(self, row: Row) -> None:
        self.run.log({**numbers_of(row), "step": row["step"]})

    def close(self, failed: bool) -> None:
        self.run.finish(exit_code=int(failed))


class Trackers:
    """All trackers of a run. One that fails is dropped with a line: tracking never ends training."""

    def __init__(self, trackers: list[Tracker]) -> None:
        self.trackers = trackers

    def log(self, row: Row) -> None:
        self._each(lambda tracker: tracker.log(row))

    def close(self, failed: bool = False) -> None:
        self._each(lambda tracker: tracker.close(failed))

    def _each(self, action: Callable[[Tracker], None]) -> None:
        for tracker in list(self.trackers):
            try:
                action(tracker)
            except Exception as error:
                print(f"{type(tracker).__name__} is switched off after {type(error).__name__}: {error}", flush=True)
                self.trackers.remove(tracker)


def check_trackers(config: Config) -> None:
    """Raises ValueError, naming the key and the mend, when a tracker's package is absent or a port is taken."""
    wanted = {"tensorboard": config.logging.tensorboard, "wandb": config.logging.wandb.enabled}
    for package, asked in wanted.items():
        if asked and importlib.util.find_spec(package) is None:
            key = "logging.tensorboard" if package == "tensorboard" else "logging.wandb.enabled"
            raise ValueError(f"{key}=true needs `pip install 'megazebra[{package}]'`; install it or set it to false")
    if config.logging.prometheus.enabled and rank() == 0:  # before the model is built, which takes its time
        Prometheus(config).close(failed=False)


def open_trackers(config: Config, first_step: int) -> Trackers:
    """The trackers that `logging` asks for, of a run that stands at `first_step`."""
    trackers: list[Tracker] = []
    if config.logging.tensorboard:
        trackers.append(TensorBoard(Path(config.run.dir), first_step))
    if config.logging.wandb.enabled:
        trackers.append(Wandb(config))
    if config.logging.prometheus.enabled:
        trackers.append(Prometheus(config))
    return Trackers(trackers)


def numbers_of(row: Row) -> dict[str, float]:
    """A row's numbers under the names they are charted by: train/loss, validation/code/loss, evaluation/text/512/…"""
    identity = identity_of(row)
    prefix = "/".join(map(str, (row["kind"], *identity.values())))
    about = {"step", *identity}
    plain = {name: value for name, value in row.items() if isinstance(value, int | float) and name not in about}
    plain |= {f"epochs/{source}": count for source, count in row.get("epochs", {}).items()}
    return {f"{prefix}/{name}": value for name, value in plain.items()}


def _has_key() -> bool:
    netrc = Path.home() / ".netrc"
    return "WANDB_API_KEY" in os.environ or (netrc.exists() and "api.wandb.ai" in netrc.read_text())
