"""Saving and resuming a run: what goes into a checkpoint, and which checkpoints fit this run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

from megazebra.checkpoint.fragments import Tensors, load_pieces, refresh_weights, snapshot, write_pieces
from megazebra.checkpoint.store import (
    CheckpointError,
    CheckpointStore,
    DamagedCheckpointError,
    Saving,
    read_index,
    read_latest,
)
from megazebra.config.keys import flat
from megazebra.config.schema import Config
from megazebra.config.stages import Stage, stages_of
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
# Data has an identity of its own.
_UNIMPORTANT = ("run", "logging", "validation", "evaluation", "profile", "checkpoint", "data")


@dataclass(frozen=True)
class Progress:
    """Where a run is: updates made (or skipped), samples consumed of its stage's data, tokens seen. There is no random
    state beside: nothing draws random numbers after the weights are initialized, and sample i is a function of i.
    """

    step: int = 0
    samples: int = 0
    tokens: int = 0


class Checkpoints:
    """The checkpoints of a run under one configuration and corpus.

    data_identity: what the samples depend on (TrainingData.identity); resuming on other data would silently repeat
    some of it and skip some. stage: whose configuration it is; None: of a run without stages.
    """

    def __init__(
        self, config: Config, engine: TrainEngine, data_identity: dict[str, Any], stage: Stage | None = None
    ) -> None:
        self.config = config
        self.engine = engine
        self.data_identity = data_identity
        self.stage = stage or stages_of(config)[0]
        self.store = CheckpointStore(
            Path(config.run.dir) / "checkpoints",
            engine.mesh.world,
            config.checkpoint.keep_last,
            config.checkpoint.keep_every,
            engine.device,
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
            "stage": {"name": self.stage.name, "number": self.stage.number, "first_step": self.stage.first_step},
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

        One with which the stage before was completed is where this stage begins. Raises CheckpointError when it is
        damaged (unless checkpoint.on_damage allows an older one), or of another configuration or corpus.
        """
        newest = folder = self.store.latest()
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
            except CheckpointError:
                if folder != newest and _stage_of(read_index(folder))["number"] != self.stage.number:
                    self.store.point_to(folder)  # another session, that stage's, goes on with it
                raise
            if folder != newest:
                self.store.point_to(folder)
            refresh_weights(self.engine)
            progress = Progress(**index["progress"])
            if _stage_of(index)["number"] != self.stage.number:
                # The guard starts anew: losses of other lengths or patterns say nothing about these.
                return replace(progress, samples=0)
            self.engine.guard.load_state_dict(index["guard"])
            self.notes += self._changes(index)
            return progress
        return Progress()

    def _load(self, folder: Path, index: dict[str, Any]) -> None:
        begins = _stage_of(index)["number"] != self.stage.number
        if begins:
            self._check_stage_before(folder, index)
        else:
            self._check_fits(index)
        carries = not begins or self.config.optimizer.state == "carry"
        load_pieces(self.engine, folder, index, self._parameters(), moments=carries)

    def _check_stage_before(self, folder: Path, index: dict[str, Any]) -> None:
        """That the checkpoint is the end of the stage before this one."""
        there, step = _stage_of(index), index["progress"]["step"]
        if there["number"] != self.stage.number - 1 or step != self.stage.first_step:
            where = f"in stage {there['name']}" if there["name"] else "of a run without stages"
            raise CheckpointError(
                f"{folder} is at step {step}, {where}: {self.stage.describe()} begins after step "
                f"{self.stage.first_step}. {self._mend(there, step)}"
            )
        if differences := list(self._other_weights(index)):
            raise CheckpointError(f"{folder} can't begin {self.stage.describe()}: {'; '.join(differences)}")

    def _mend(self, there: dict[str, Any], step: int) -> str:
        """What to do about a checkpoint of another stage than the one whose end was looked for."""
        if there["number"] >= self.stage.number:
            return "Give the run the stages that it was written with, or choose another run.dir"
        if step > self.stage.first_step:
            return (
                f"That stage has made {step - there['first_step']} steps already: set stages.{there['name']}"
                ".train.steps to that or more"
            )
        return "Start the same command again to go on from there"

    def _check_fits(self, index: dict[str, Any]) -> None:
        written, now = flat(index["config"]), flat(self.config.model_dump(mode="json"))
        differences = [
            f"{key}={written.get(key)!r} there, {now.get(key)!r} here"
            for key in _MUST_AGREE
            if written.get(key) != now.get(key)
        ]
        differences += self._other_stage(index)
        differences += self._other_weights(index)
        old_data, new_data = flat(index["data"]), flat(self.data_identity)
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

    def _other_stage(self, index: dict[str, Any]) -> Iterator[str]:
        there = _stage_of(index)
        if there["name"] != self.stage.name:
            yield f"its stage is {there['name']!r} there, {self.stage.name!r} here"
        elif there["first_step"] != self.stage.first_step:
            yield (
                f"stage {self.stage.name} began after step {there['first_step']} there, after {self.stage.first_step} "
                "here: stages that are complete can't get other lengths"
            )

    def _other_weights(self, index: dict[str, Any]) -> Iterator[str]:
        """Weights of other shapes, after the keys that differ."""
        there, here = index["parameters"], self._parameters()
        if there == here:
            return
        written, now = flat(index["config"]), flat(self.config.model_dump(mode="json"))
        for key in now:
            if key.startswith("model.") and written.get(key) != now.get(key):
                yield f"{key}={written.get(key)!r} there, {now.get(key)!r} here"
        names = (name for name in sorted(there.keys() | here.keys()) if there.get(name) != here.get(name))
        for name in islice(names, 2):
            yield (
                f"the weight {name} is {_shape_in_words(there.get(name))} there, {_shape_in_words(here.get(name))} here"
            )

    def _changes(self, index: dict[str, Any]) -> Iterator[str]:
        """What differs from the run that wrote the checkpoint and may."""
        written, now = flat(index["config"]), flat(self.config.model_dump(mode="json"))
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


def stage_to_go_on_with(stages: Sequence[Stage], run_dir: Path, *, go_back: bool) -> Stage:
    """The stage that the run's newest checkpoint is in, or the one after it where that is complete.

    go_back: whether an older one will do where its index is damaged. Raises CheckpointError when it is of a stage that
    is not among `stages`, or damaged. To be called on one rank, before any session: only the index is read.
    """
    store = run_dir / "checkpoints"
    if not has_checkpoint(run_dir):
        return stages[0]
    newest = read_latest(store) or ""
    index = None
    for name in sorted((path.name for path in store.glob("step_????????") if path.name <= newest), reverse=True):
        try:
            index = read_index(store / name)
            break
        except DamagedCheckpointError:
            if not go_back:
                raise
    if index is None:
        return stages[0]  # resuming there says what is damaged
    there = _stage_of(index)
    stage = stages[min(there["number"], len(stages) - 1)]
    if stage.name != there["name"]:
        names = ", ".join(repr(stage.name) for stage in stages)
        raise CheckpointError(
            f"{store / newest} is in stage {there['name']!r}, number {there['number'] + 1}; this run has the stages "
            f"{names}. Put it back where it was, or begin another run.dir from these weights (checkpoint.init_from)"
        )
    if index["progress"]["step"] >= stage.last_step and stage.number + 1 < len(stages):
        return stages[stage.number + 1]
    return stage


def _stage_of(index: dict[str, Any]) -> dict[str, Any]:
    """The index's stage; checkpoints of earlier versions are of runs without."""
    return index.get("stage") or {"name": "", "number": 0, "first_step": 0}


def _shape_in_words(parameter: dict[str, Any] | None) -> str:
    return "not there" if parameter is None else str(parameter["shape"])


def has_checkpoint(run_dir: Path) -> bool:
    return (run_dir / "checkpoints" / "latest").exists()
