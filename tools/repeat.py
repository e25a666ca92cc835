"""Make the first steps of a run again, and compare losses and gradient norms with what it has recorded.

    python tools/repeat.py runs/zebra                                  the first 10 steps, on as many ranks
    python tools/repeat.py runs/zebra --steps 50 --ranks 4 --parallel.tensor=2
    python tools/repeat.py runs/zebra --run-dir /shared/again --launch 'srun --nodes 4 --ntasks-per-node 8 python'

The run's own configuration, DeepSpeed settings and variables are taken from its run.json (megazebra/train/audit.py);
further --section.key=value change them. Validation, trackers and checkpoints (but those between stages) are left out.
Ends with 0 where the numbers are equal bit for bit or to rounding, with 1 where they differ, and says what else does.
"""

from __future__ import annotations

import argparse
import copy
import json
import shlex
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megazebra.config import Config, load_config, save_config
from megazebra.config.keys import flat
from megazebra.errors import UserError
from megazebra.launch import readable_errors
from megazebra.supervise.processes import Job
from megazebra.train.audit import FILE, Start, read_starts
from megazebra.train.metrics import Row, read_metrics

PRETRAIN = Path(__file__).resolve().parents[1] / "pretrain_zebra.py"
# A loss is a mean over many tokens, so what is rounded in each cancels out: some 100 ulps of float32 are left, and of
# bf16 (ulp 2^-8) a quarter of one. Gradients cancel out, too, which makes them relatively less exact than losses.
ROUNDING = {"fp32": 1e-5, "bf16": 1e-3}
NORM_ROUNDING = 10.0  # times as much for gradient norms
# Variables of the first start that decide what is computed; those of the network belong to the machines of today.
REPEATED_VARIABLES = (
    *("OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUBLAS_WORKSPACE_CONFIG", "NCCL_ALGO", "NCCL_PROTO", "DS_ACCELERATOR"),
    *("MEGAZEBRA_SIMD", "MEGAZEBRA_INDEX_BUILDER"),
)
FACTS = (
    "versions",
    "hosts",
    "data",
    "init_from",
    "deepspeed_config",
    "attention_backend",
    "determinism",
    "environment",
)
NOT_COMPUTED = ("run", "logging", "validation", "evaluation", "profile", "parallel")
HELD_OUT: dict[str, Any] = {"validation_path": None, "validation_sources": {}}


@dataclass(frozen=True)
class Original:
    """A run to be repeated: what its first start was made of, and the rows of the steps made under its configuration.

    start: None where nothing was recorded. resumed: starts after the first one, as far as they made these steps.
    """

    folder: Path
    config: Config
    start: Start | None
    rows: list[Row]
    resumed: list[Start]

    @classmethod
    def open(cls, folder: Path) -> Original:
        """Raises UserError where there is no step to compare with."""
        metrics = folder / "metrics.jsonl"
        if not metrics.exists():
            raise UserError(f"{metrics} does not exist; give the folder of a run (run.dir)")
        rows = train_rows(folder)
        starts = read_starts(folder)
        begun = [number for number, start in enumerate(starts) if start.get("first_step") == 0]
        if not begun:  # by a version that recorded nothing: the configuration may be that of a later start
            return cls._with_steps(folder, load_config(folder / "config.yaml"), None, rows, [])
        first, later = starts[begun[-1]], starts[begun[-1] + 1 :]
        config = config_of(first, folder)
        resumed = []
        for start in later:
            if computed(config_of(start, folder)) != computed(config):
                rows = [row for row in rows if row["step"] <= start["first_step"]]
                break
            resumed.append(start)
        return cls._with_steps(folder, config, first, rows, resumed)

    @classmethod
    def _with_steps(
        cls, folder: Path, config: Config, start: Start | None, rows: list[Row], resumed: list[Start]
    ) -> Original:
        if not rows or rows[0]["step"] != 1:
            raise UserError(f"{folder} has recorded no step that its first configuration has made: nothing to repeat")
        return cls(folder, config, start, rows, resumed)

    @property
    def ranks(self) -> int | None:
        return None if self.start is None else sum(len(host["ranks"]) for host in self.start["hosts"].values())

    @property
    def rounding(self) -> float:
        """Relative difference of losses that is put down to rounding."""
        return ROUNDING[self.config.train.precision]


@dataclass(frozen=True)
class Step:
    """A step then and now: losses and gradient norms, None where they were not finite."""

    number: int
    losses: tuple[float | None, float | None]
    norms: tuple[float | None, float | None]

    @property
    def same(self) -> bool:
        return self.losses[0] == self.losses[1] and self.norms[0] == self.norms[1]

    def beyond(self, rounding: float) -> bool:
        return difference(self.losses) > rounding or difference(self.norms) > NORM_ROUNDING * rounding


def main(arguments: Sequence[str] | None = None) -> None:
    options, overrides = parse_arguments(arguments)
    original = Original.open(options.run)
    steps = min(options.steps, len(original.rows))
    ranks = options.ranks or original.ranks
    if ranks is None:
        raise UserError(f"{options.run / FILE} does not exist, so nobody knows on how many ranks it ran; give --ranks")
    with rerun_folder(options.run_dir) as folder:
        print(f"{original.folder}: steps 1 to {steps} again, on {ranks} ranks, in {folder}", flush=True)
        run_again(original, folder, steps, launcher(options.launch, ranks), overrides)
        compared = compare(original.rows, train_rows(folder), steps)
        print("\n".join(table(compared)))
        rounding = options.rounding or original.rounding
        print(verdict(compared, rounding))
        if not all(step.same for step in compared):
            print("\n".join(what_differs(original, steps, read_starts(folder)[0])))
    if any(step.beyond(rounding) for step in compared):
        sys.exit(1)


def parse_arguments(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)  # fmt: skip
    parser.add_argument("run", metavar="RUN", type=Path, help="folder of a run (run.dir)")
    parser.add_argument("--steps", type=int, default=10, help="how many, from the first one (default: 10)")
    parser.add_argument("--ranks", type=int, help="processes on this machine (default: as many as the run had)")
    parser.add_argument("--launch", metavar="COMMAND", help="starts the processes, in place of the DeepSpeed launcher")
    parser.add_argument("--run-dir", metavar="DIR", type=Path, help="keep the rerun here (default: a temporary folder)")
    parser.add_argument(
        "--rounding", type=float,
        help=f"relative difference of losses that counts as equal; norms: {NORM_ROUNDING:.0f} times that "
        f"(default: {', '.join(f'{name} {size:g}' for name, size in ROUNDING.items())})",
    )  # fmt: skip
    options, overrides = parser.parse_known_args(arguments)
    for argument in overrides:
        if not argument.startswith("--") or "." not in argument.partition("=")[0] or "=" not in argument:
            parser.error(f"{argument!r} is no option; a key of the configuration is written --section.key=value")
    if options.steps < 1 or (options.ranks is not None and options.ranks < 1):
        parser.error("--steps and --ranks begin at 1")
    return options, overrides


def train_rows(folder: Path) -> list[Row]:
    path = folder / "metrics.jsonl"
    return [row for row in read_metrics(path) if row["kind"] == "train"] if path.exists() else []


def config_of(start: Start, folder: Path) -> Config:
    try:
        return Config.model_validate(start["config"])
    except (KeyError, ValueError) as error:
        raise UserError(f"{folder / FILE} holds a configuration of another version: {error}") from error


def computed(config: Config) -> dict[str, Any]:
    """The keys that decide what is computed, wherever and by however many."""
    tree = config.model_dump(mode="json")
    tree["checkpoint"] = {"init_from": config.checkpoint.init_from}
    tree["data"] |= HELD_OUT
    return {name: section for name, section in tree.items() if name not in NOT_COMPUTED}


def quiet(config: Config, folder: Path) -> Config:
    """The same training in another folder with nothing beside it: no validation, trackers and periodic checkpoints."""
    tree = copy.deepcopy(config.model_dump())
    tree["run"]["dir"] = str(folder)
    tree["checkpoint"] |= {"interval": 0, "keep_every": 0, "resume": "never"}
    tree |= {"logging": {"progress": "lines"}, "profile": {}, "evaluation": {}}
    tree["validation"]["interval"] = 0
    tree["data"] |= HELD_OUT
    for stage in tree["stages"].values():
        stage.pop("validation", None)
        stage.pop("evaluation", None)
        if "data" in stage:
            stage["data"] = {key: value for key, value in stage["data"].items() if key not in HELD_OUT}
    return Config.model_validate(tree)


def launcher(command: str | None, ranks: int) -> list[str]:
    if command is not None:
        return shlex.split(command)
    if ranks == 1:
        return [sys.executable]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    beside = Path(sys.executable).with_name("deepspeed")
    return [str(beside), "--num_gpus", str(ranks), "--master_port", str(port)]


@contextmanager
def rerun_folder(given: Path | None) -> Iterator[Path]:
    if given is not None:
        if (given / "metrics.jsonl").exists():
            raise UserError(f"--run-dir {given} holds a run already; give another folder")
        given.mkdir(parents=True, exist_ok=True)
        yield given.resolve()
        return
    with tempfile.TemporaryDirectory(prefix="megazebra-repeat-") as temporary:
        yield Path(temporary)


def run_again(original: Original, folder: Path, steps: int, launch: list[str], overrides: Sequence[str]) -> None:
    """Train in `folder` until that many steps are made, then end it. Raises UserError when it ends before."""
    start = original.start or {}
    save_config(quiet(original.config, folder), folder / "again.yaml")
    command = [*launch, str(PRETRAIN), "--config", str(folder / "again.yaml"), *overrides]
    if start.get("deepspeed_config"):
        (folder / "deepspeed.json").write_text(json.dumps(start["deepspeed_config"]))
        command += ["--deepspeed_config", str(folder / "deepspeed.json")]
    recorded = {name: value for name, value in start.get("environment", {}).items() if name in REPEATED_VARIABLES}
    there = Path(start.get("working_directory", "."))  # relative paths in the configuration begin there
    log = folder / "output.txt"
    with log.open("w") as output:
        job = Job(command, cwd=there if there.is_dir() else None, variables=recorded, output=output)
        try:
            while len(train_rows(folder)) < steps:
                if job.exit_code() is not None and len(train_rows(folder)) < steps:
                    raise UserError(f"the rerun ended before step {steps}:\n{log.read_text(errors='replace')[-4000:]}")
                time.sleep(0.1)
        finally:
            job.end(0)  # what has been asked for is in the metrics file


def compare(then: list[Row], now: list[Row], steps: int) -> list[Step]:
    return [
        Step(a["step"], (a["loss"], b["loss"]), (a["grad_norm"], b["grad_norm"]))
        for a, b in zip(then[:steps], now[:steps], strict=True)
    ]


def difference(values: tuple[float | None, float | None]) -> float:
    """Relative; inf where only one is finite."""
    then, now = values
    if then == now:
        return 0.0
    if then is None or now is None:
        return float("inf")
    return abs(then - now) / max(abs(then), abs(now))


def table(steps: Sequence[Step]) -> Iterator[str]:
    again = f"{'again':>21} {'relative':>9}"
    yield f"{'step':>6}  {'loss':>21} {again}  {'gradient norm':>21} {again}"
    for step in steps:
        cells = []
        for values in (step.losses, step.norms):
            shown = " ".join(f"{'not finite' if value is None else repr(value):>21}" for value in values)
            cells.append(f"{shown} {difference(values):9.1e}" if values[0] != values[1] else f"{shown} {'=':>9}")
        yield f"{step.number:>6}  {cells[0]}  {cells[1]}"


def verdict(steps: Sequence[Step], rounding: float) -> str:
    if all(step.same for step in steps):
        return f"bit for bit: losses and gradient norms of {len(steps)} steps are the same numbers"
    for step in steps:
        if step.beyond(rounding):
            return f"differs from step {step.number} on: by more than {rounding:g} of the loss is not rounding"
    worst_loss = max(steps, key=lambda step: difference(step.losses))
    worst_norm = max(steps, key=lambda step: difference(step.norms))
    return (
        f"equal to rounding: the largest relative differences are {difference(worst_loss.losses):.1e} of the loss "
        f"(step {worst_loss.number}) and {difference(worst_norm.norms):.1e} of the gradient norm "
        f"(step {worst_norm.number})"
    )


def what_differs(original: Original, steps: int, now: Start) -> Iterator[str]:
    """What else is not as it was: the first things to look at."""
    if original.start is None:
        yield f"{original.folder / FILE} does not exist: what the run was made of is not known"
        return
    for start in original.resumed:
        if 0 < start["first_step"] < steps:
            yield f"the run was resumed after step {start['first_step']}"
    then, today = (facts(start, original.folder) for start in (original.start, now))
    changed = [name for name in {**then, **today} if then.get(name) != today.get(name)]
    yield "not as it was:" if changed else "nothing else that is recorded differs: the kernels may not be deterministic"
    yield from (f"  {name}: {then.get(name)!r} then, {today.get(name)!r} now" for name in changed)


def facts(start: Start, folder: Path) -> dict[str, Any]:
    """What may decide a run's numbers, by dotted name."""
    config = config_of(start, folder)
    keys = {**computed(config), "parallel": config.parallel.model_dump()}
    return flat({**{name: start.get(name) for name in FACTS}, "git": start["git"]["megazebra"], "config": keys})


if __name__ == "__main__":
    with readable_errors():
        main()
