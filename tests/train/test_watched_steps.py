"""What is measured of steps on several ranks: each rank's own work, a slow rank, and where the time goes."""

from __future__ import annotations

import gzip
import json
import re
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.distributed import run_distributed
from support.training import CPU, make_engine, run_steps, tiny_config

from megazebra.config import Config, ConfigError, check_world, load_config
from megazebra.parallel.traffic import TrafficCounter
from megazebra.train.engine import start_deepspeed
from megazebra.train.loop import step_times
from megazebra.train.parts import REST
from megazebra.train.profiler import Profiler
from megazebra.train.stragglers import THRESHOLD, WINDOW, StepTimes, Stragglers
from megazebra.train.watchdog import Watchdog

SLOW_RANK, DELAY_S, STEPS = 1, 0.15, 5
SMALL: dict[str, Any] = {"model__num_layers": 2, "model__pattern": "GL", "train__global_batch_size": 2}
LAYOUTS: dict[str, dict[str, Any]] = {
    "zero": {"parallel__zero_stage": 3},  # begins collectives and waits for them later
    "tp": {"parallel__tensor": 2, "parallel__sequence_parallel": True},
    "cp": {"parallel__context": 2, "parallel__zero_stage": 1, "train__recompute": "full"},
}


@dataclass
class Watched:
    """A step on one rank. seconds: what it took. calls: collectives made to find out the times."""

    times: StepTimes
    seconds: float
    calls: int
    marked: bool


def watch(layouts: dict[str, dict[str, Any]], folder: str) -> dict[str, list[Watched]]:
    """Steps of every layout, in which one rank sleeps; it records the second and the third of them."""
    start_deepspeed(CPU, timeout_s=120)
    return {name: watch_steps(tiny_config(**SMALL, **layout, run__dir=f"{folder}/{name}", profile__steps="2:3",
            profile__ranks=(SLOW_RANK,))) for name, layout in layouts.items()}  # fmt: skip


def watch_steps(config: Config) -> list[Watched]:
    engine = make_engine(config)
    mesh, forward = engine.mesh, engine.forward

    def delayed(module: Any, batch: Any) -> torch.Tensor:
        time.sleep(DELAY_S if mesh.world.rank == SLOW_RANK else 0)
        return forward(module, batch)

    engine.forward = delayed
    loader = SimpleNamespace(wait_s=0.25 * mesh.world.rank, next_step=lambda samples: [])
    session: Any = SimpleNamespace(
        engine=engine, mesh=mesh, device=CPU, config=config, loader=loader, reporter=None,
        watchdog=Watchdog(mesh.world.rank, mesh.world.size),
    )  # fmt: skip
    profiler = Profiler(session)
    watched = []
    for step in range(STEPS):  # as the loop does it
        profiler.before(step + 1)
        marked = any("forward" in vars(module) for module in engine.module.modules())
        started = time.perf_counter()
        mesh.traffic.reset()
        mesh.waits.reset()
        loader.next_step(0)
        run_steps(engine, config, range(step, step + 1))
        seconds = time.perf_counter() - started
        profiler.after(step + 1)
        mesh.traffic.reset()
        times = step_times(session, seconds)
        watched.append(Watched(times, seconds, sum(tally.calls for tally in mesh.traffic.tallies.values()), marked))
    engine.close()
    return watched


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def watched(folder: Path) -> list[dict[str, list[Watched]]]:
    return run_distributed(watch, 2, LAYOUTS, str(folder))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_waiting_for_a_slow_rank_is_no_work(layout: str, watched: list[dict[str, list[Watched]]]) -> None:
    quick, slow = (rank[layout] for rank in watched)
    steps = [step.times for step in quick]
    assert steps == [step.times for step in slow]
    assert {step.calls for step in (*quick, *slow)} == {1}, "one collective tells it all"
    assert {times.data_wait_s for times in steps} == {0.25}, "of the rank that waited longest"
    # The machine may delay any rank in a step; hardly the same one in three of five, and as much as the sleep.
    assert statistics.median(times.slowest_rank for times in steps) == SLOW_RANK
    assert statistics.median(times.spread_s for times in steps) > DELAY_S / 2
    # Sleeping counts for the one that slept, and no work is longer than its step.
    for rank, own in enumerate((quick, slow)):
        assert all(0 <= step.times.work_s[rank] <= step.seconds + 1e-6 for step in own)


def test_the_slow_rank_is_told_of_once_and_again_after_it_recovered() -> None:
    stragglers = Stragglers()

    def said(ratio: float, steps: int) -> list[str]:
        return [text for _ in range(steps) for text in stragglers.step(StepTimes(0.0, [1.0, 1.02, ratio, 0.98]))]

    assert said(THRESHOLD - 0.01, 3 * WINDOW) == []
    assert said(9.0, WINDOW // 2 - 1) == [], "fewer than half of the window: no habit"
    assert said(1.0, WINDOW) == []
    (text,) = said(2.0, 2 * WINDOW)
    assert text.startswith(f"rank 2 is slow: in the last {WINDOW} steps its own work took 1.50 times as long as that")
    assert said(1.0, WINDOW) == []
    assert len(said(2.0, WINDOW)) == 1


def test_of_two_ranks_the_fast_one_is_the_measure() -> None:
    times = StepTimes(0.0, [0.75, 0.25])
    assert (times.slowest_rank, times.median_work_s, times.spread_s) == (0, 0.25, 0.5)
    assert Stragglers().step(StepTimes(0.0, [0.0])) == [], "one rank, and a clock that stood still"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_window_is_recorded_and_leaves_nothing_behind(
    layout: str, watched: list[dict[str, list[Watched]]], folder: Path
) -> None:
    silent, recording = ([step.marked for step in rank[layout]] for rank in watched)
    assert silent == [False] * STEPS
    assert recording == [False, True, True, False, False]
    name, profiles = f"steps_2-3.rank_{SLOW_RANK}", folder / layout / "profile"
    assert {path.name for path in profiles.iterdir()} == {f"{name}.json", f"{name}.trace.json.gz"}
    table = json.loads((profiles / f"{name}.json").read_text())
    about = {key: table[key] for key in ("first_step", "last_step", "rank", "device", "time")}
    assert about == {"first_step": 2, "last_step": 3, "rank": SLOW_RANK, "device": "cpu", "time": "host"}
    parts = table["parts"]
    communication = {part for part in parts if part.startswith("communication, ")}
    assert f"communication, {layout}" in communication
    assert parts.keys() - communication == {
        "attention, global layers", "attention, local layers", "attention, projections", "MLP, projections",
        "MLP, SwiGLU product", "output layer, loss", "embedding", "RMSNorm", "RoPE", "optimizer", "data", REST,
    }  # fmt: skip
    assert all(seconds > 0 for seconds in parts.values()), parts
    assert parts[REST] > DELAY_S, "nothing that is marked sleeps"
    assert sum(parts.values()) == pytest.approx(table["seconds_per_step"])
    # The trace has a range for every part, and two of the steps.
    trace = json.loads(gzip.decompress((profiles / f"{name}.trace.json.gz").read_bytes()))
    ranges = [event for event in trace["traceEvents"] if str(event.get("name", "")).startswith("part: ")]
    assert {event["name"].removeprefix("part: ") for event in ranges} == (parts.keys() - {REST}) | {"step"}
    steps = [event["dur"] * 1e-6 for event in ranges if event["name"] == "part: step"]
    assert len(steps) == 2
    assert sum(steps) / 2 == pytest.approx(table["seconds_per_step"], rel=0.01)


def test_a_profile_that_cannot_be_written_ends_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "profile").write_text("in the way")
    config = Config.model_validate({"run": {"dir": str(tmp_path)}, "profile": {"steps": "1:1"}})
    engine = SimpleNamespace(
        module=torch.nn.Module(), deepspeed=SimpleNamespace(step=None),
        mesh=SimpleNamespace(world=SimpleNamespace(rank=0), traffic=TrafficCounter()),
    )  # fmt: skip
    loader = SimpleNamespace(next_step=None)
    session: Any = SimpleNamespace(
        engine=engine, mesh=engine.mesh, device=CPU, config=config, loader=loader, reporter=None,
        watchdog=Watchdog(0, 1),
    )  # fmt: skip
    profiler = Profiler(session)
    profiler.before(1)
    profiler.after(1)
    assert re.fullmatch(r"the profile of rank 0 is lost: .*File exists: '.*profile'\n", capsys.readouterr().out)
    assert engine.mesh.traffic.watchers == []
    assert loader.next_step is None


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("10", "must be the first and the last step, such as 10:12"),
        ("10:", "must be the first and the last step, such as 10:12"),
        ("0:3", "must be first:last with 1 <= first <= last"),
        ("12:10", "must be first:last with 1 <= first <= last"),
        ("10:1001", "the run has only 1000 steps; choose a window within them"),
    ],
)
def test_a_window_that_cannot_be(value: str, problem: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load_config(None, [f"profile.steps={value}"])
    (text,) = refused.value.problems
    assert f"profile.steps={value}" in text
    assert problem in text


def test_a_window_that_can_be() -> None:
    assert load_config(None, ["profile.steps=10:1000"]).profile.window == (10, 1000)
    assert load_config(None).profile.window is None
    with pytest.raises(ConfigError, match=r"profile.ranks=\[\]: names no rank"):
        load_config(None, ["profile.steps=1:2", "profile.ranks=[]"])
    with pytest.raises(ConfigError, match=r"profile.ranks has 4, but the ranks are 0 to 3"):
        check_world(load_config(None, ["profile.steps=1:2", "profile.ranks=[0,4]"]), 4)
