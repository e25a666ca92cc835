"""Saving and resuming a run: what goes into a checkpoint, and which checkpoints fit this run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from megazebra.checkpoint.fragments import Tensors, load_pieces, refresh_weights, snapshot, write_pieces
from megazebra.checkpoint.store import CheckpointError, CheckpointStore, DamagedCheckpointError, Saving
from megazebra.config.schema import Config
from megazebra.parallel.sharding import full_shape
from megazebra.train.engine import TrainEngine

# A resumed run must agree with its checkpoint in these. What else differs may be meant, and is told.
_MUST_AGREE = (
    "optimizer.name",
    "train.seed",
    "train.global_batch_size",
    "data.seq_len",
    "data.document_mask",
)
_UNIMPORTANT = ("run", "logging", "validation", "checkpoint", "data")  # data has an identity of its own


@dataclass(frozen=True)
class Progress:
    """Where a run is: updates made (or skipped), samples consumed, tokens seen. There is no random state
    beside: nothing draws random numbers after the weights are initialized, and sample i is a function of i.
    """

    step: int = 0
    samples: int = 0
    tokens: int = 0


class Checkpoints:
    """The checkpoints of a run under one configuration and corpus.

    data_identity: what the samples depend on (TrainingData.identity); resuming on other data would silently repeat
    some of it and skip some.
    """

    def __init__(self, config: Config, engine: TrainEngine, data_identity: dict[str, Any]) -> None:
        self.config = config
        self.engine = engine
        self.data_identity = data_identity
        self.store = CheckpointStore(
            Path(config.run.dir) / "checkpoints",
            engine.mesh.world,
            config.checkpoint.keep_last,
            config.checkpoint.keep_every,
        )
        self.notes: list[str] = []  # about the checkpoint that was resumed, for the user
        self._copies: Tensors = {}
        self._saving: Saving | None = None

    def save(self, progress: Progress) -> list[Saving]:
        """Take a checkpoint: the state is copied now and written beside training, or now (checkpoint.asynchronous).

        Returns the savings that are complete: this one if it was written now, before it an earlier one that was still
        being written. Raises CheckpointError on all ranks when one of them cannot.
        """
        complete = self.completed(wait=True)
        index = {
            "progress": asdict(progress),
            "guard": self.engine.guard.state_dict(),
            "layout": self._layout(),
            "data": self.data_identity,
            "config": self.config.model_dump(mode="json"),
            "parameters": self._parameters(),
            "versions": {package: version(package) for package in ("megazebra", "torch", "deepspeed")},
        }
        self._copies = copies = snapshot(self.engine, self._copies)
        mesh = self.engine.mesh
        self._saving = self.store.begin(progress.step, lambda folder: write_pieces(copies, folder, mesh), index)
        return complete if self.config.checkpoint.asynchronous else [*complete, *self.completed(wait=True)]

    def completed(self, *, wait: bool = False) -> list[Saving]:
        """The saving that has been completed since the last call, if any (every rank calls it after every step).

        wait: until it is. Raises CheckpointError on all ranks when one of them could not write.
        """
        saving = self._saving
        if saving is None or not (wait or self.store.all_written(saving)):
            return []
        self._saving = None
        return [self.store.finish(saving)]

    def resume(self) -> Progress:
        """Load the newest checkpoint, where there is one, under whatever layout it was written.

        Raises CheckpointError when it is damaged (unless checkpoint.on_damage allows an older one), or of another
        configuration or corpus.
        """
        folder = self.store.latest()
        while folder is not None:
            try:
                index = self.store.load(folder, self._load)
            except DamagedCheckpointError as damage:
                older = self.store.older_than(folder)
                if self.config.checkpoint.on_damage == "stop" or older is None:
                    raise
                self.notes.append(f"went back to {older.name}: {damage}")
                folder = older
                continue
            refresh_weights(self.engine)
            self.engine.guard.load_state_dict(index["guard"])
            self.notes += self._changes(index)
            return Progress(**index["progress"])
        return Progress()

    def _load(self, folder: Path, index: dict[str, Any]) -> None:
        self._check_fits(index)
        load_pieces(self.engine, folder, index, self._parameters())

    def _check_fits(self, index: dict[str, Any]) -> None:
        written, now = _flatten(index["config"]), _flatten(self.config.model_dump(mode="json"))
        differences = [
            f"{key}={written.get(key)!r} there, {now.get(key)!r} here"
            for key in _MUST_AGREE
            if written.get(key) != now.get(key)
        ]
        there, here = index["parameters"], self._parameters()
        if there != here:
            differences += [
                f"{key}={written.get(key)!r} there, {now.get(key)!r} here"
                for key in now
                if key.startswith("model.") and written.get(key) != now.get(key)
            ]
        differences += [
            f"the weight {name} is {_shape_in_words(there.get(name))} there, {_shape_in_words(here.get(name))} here"
            for name in sorted(there.keys() | here.keys())
            if there.get(name) != here.get(name)
        ][:2]
        old_data, new_data = _flatten(index["data"]), _flatten(self.data_identity)
        differences += [
            f"the training data's {name}: {old_data.get(name)} there, {new_data.get(name)} here"
            for name in sorted(old_data.keys() | new_data.keys())
            if old_data.get(name) != new_data.get(name)
        ]
        if differences:
            raise CheckpointError(
                "it belongs to another configuration: "
                + "; ".join(differences)
                + ". Correct these, or choose another run.dir to start afresh"
            )

    def _changes(self, index: dict[str, Any]) -> Iterator[str]:
        """What differs from the run that wrote the checkpoint and may."""
        written, now = _flatten(index["config"]), _flatten(self.config.model_dump(mode="json"))
        written |= {f"layout.{key}": size for key, size in index["layout"].items()}
        now |= {f"layout.{key}": size for key, size in self._layout().items()}
        for key in sorted(written.keys() | now.keys()):
            if written.get(key) != now.get(key) and key.split(".")[0] not in (*_UNIMPORTANT, "parallel"):
                yield f"changed: {key} from {written.get(key)} to {now.get(key)}"

    def _layout(self) -> dict[str, int]:
        mesh = self.engine.mesh
        return {
            "data": mesh.dp.size,
            "context": mesh.cp.size,
            "tensor": mesh.tp.size,
            "zero_stage": self.engine.zero_stage,
        }

    def _parameters(self) -> dict[str, dict[str, Any]]:
        """Whole shapes and split dimensions: with them the pieces can be put together under any layout."""
        return {
            name: {
                "shape": list(full_shape(parameter, getattr(parameter, "ds_shape", parameter.shape))),
                "partition_dim": getattr(parameter, "partition_dim", None),
            }
            for name, parameter in self.engine.module.named_parameters()
        }


def _shape_in_words(parameter: dict[str, Any] | None) -> str:
    return "not there" if parameter is None else str(parameter["shape"])


def has_checkpoint(run_dir: Path) -> bool:
    return (run_dir / "checkpoints" / "latest").exists()


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
