"""Saving and resuming a run: what goes into a checkpoint, and which checkpoints fit this run."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from megazebra.checkpoint.fragments import load_pieces, refresh_weights, save_pieces
from megazebra.checkpoint.store import CheckpointError, CheckpointStore
from megazebra.config.schema import Config
from megazebra.parallel.sharding import full_shape
from megazebra.train.engine import TrainEngine

# A resumed run must agree with its checkpoint in these; the rest (learning rate, steps, intervals, logging ...)
# may be changed on purpose.
_MUST_AGREE = (
    "model",
    "optimizer.name",
    "train.seed",
    "train.precision",
    "train.global_batch_size",
    "data.seq_len",
    "data.document_mask",
)


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
            Path(config.run.dir) / "checkpoints", engine.mesh.world, config.checkpoint.keep_last
        )

    def save(self, progress: Progress) -> Path:
        """Write a checkpoint. Raises CheckpointError on all ranks when one of them cannot."""
        index = {
            "progress": asdict(progress),
            "guard": self.engine.guard.state_dict(),
            "layout": self._layout(),
            "data": self.data_identity,
            "config": self.config.model_dump(mode="json"),
            "parameters": self._parameters(),
            "versions": {package: version(package) for package in ("megazebra", "torch", "deepspeed")},
        }
        return self.store.save(progress.step, lambda folder: save_pieces(self.engine, folder), index)

    def resume(self) -> Progress:
        """Load the newest checkpoint, where there is one.

        Raises CheckpointError when it is damaged, of another configuration, layout or corpus.
        """
        folder = self.store.latest()
        if folder is None:
            return Progress()
        index = self.store.load(folder, self._load)
        refresh_weights(self.engine)
        self.engine.guard.load_state_dict(index["guard"])
        return Progress(**index["progress"])

    def _load(self, folder: Path, index: dict[str, Any]) -> None:
        self._check_fits(index)
        load_pieces(self.engine, folder, index)

    def _check_fits(self, index: dict[str, Any]) -> None:
        written, now = _flatten(index["config"]), _flatten(self.config.model_dump(mode="json"))
        differences = [
            f"{key}={written.get(key)!r} there, {now.get(key)!r} here"
            for key in sorted(written.keys() | now.keys())
            if any(key == prefix or key.startswith(prefix + ".") for prefix in _MUST_AGREE)
            and written.get(key) != now.get(key)
        ]
        differences += [
            f"{key} size {size} there, {self._layout()[key]} here (another layout cannot be resumed yet)"
            for key, size in index["layout"].items()
            if size != self._layout()[key]
        ]
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

    def _layout(self) -> dict[str, int]:
        mesh = self.engine.mesh
        return {
            "data": mesh.dp.size,
            "context": mesh.cp.size,
            "tensor": mesh.tp.size,
            "zero_stage": self.engine.zero_stage,
        }

    def _parameters(self) -> dict[str, dict[str, Any]]:
        """Whole shapes and split dimensions: with them the pieces can be put together offline."""
        return {
            name: {
                "shape": list(full_shape(parameter, getattr(parameter, "ds_shape", parameter.shape))),
                "partition_dim": getattr(parameter, "partition_dim", None),
            }
            for name, parameter in self.engine.module.named_parameters()
        }


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
