"""Policy of the supervisor, with a program in place of the run that leaves what a run leaves and ends as it is told."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megazebra.config import Config
from megazebra.config.stages import stages_of
from megazebra.errors import UserError
from megazebra.supervise import supervisor
from megazebra.supervise.progress import largest_world, made_step, saved_step
from megazebra.supervise.supervisor import RECORD, Policy, Supervisor, signal_name

LAST = 100
# Each start does the next of the plan's lines: "saved step, exit code".
PROGRAM = """
import pathlib, sys
ranks, folder = sys.argv[1:]
plan, folder = pathlib.Path(folder, "plan"), pathlib.Path(folder)
now, *later = plan.read_text().splitlines()
plan.write_text("\\n".join(later))
step, code = now.split()
(folder / "checkpoints").mkdir(exist_ok=True)
(folder / "checkpoints" / "latest").write_text(f"step_{int(step):08d}\\n")
sys.exit(int(code))
"""


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """The supervisor is a program's main part and keeps its handlers."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def config(**sections: dict[str, Any]) -> Config:
    return Config.model_validate({"train": {"steps": LAST, "global_batch_size": 12}, **sections})


def supervise(folder: Path, plan: list[str], **policy: Any) -> tuple[int, list[dict[str, Any]]]:
    (folder / "plan").write_text("\n".join(plan))
    (folder / "program.py").write_text(PROGRAM)
    launch = f"{sys.executable} {folder}/program.py {{ranks}}"
    options = {"ranks": 4, "pause_s": 0.0, **policy}
    code = Supervisor(stages_of(config()), folder, launch, [str(folder)], Policy(**options)).run()
    return code, [json.loads(line) for line in (folder / RECORD).read_text().splitlines()]


STEPPING = """
import pathlib, sys, time
ranks, folder = sys.argv[1:]
folder = pathlib.Path(folder)
(folder / "started").touch()
(folder / "metrics.jsonl").write_text('{"kind": "train", "step": 1}\\n')
while not (folder / "asked").exists():
    time.sleep(0.01)
time.sleep(0.5)
(folder / "checkpoints").mkdir()
(folder / "checkpoints" / "latest").write_text("step_00000100\\n")
"""


def test_a_run_that_goes_well_does_not_end_by_a_broken_available(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "program.py").write_text(STEPPING)
    available = f"if [ -e {tmp_path}/started ]; then touch {tmp_path}/asked; echo driver is gone; else echo 3; fi"
    policy = Policy(ranks=4, available=available, look_again_s=0.1)
    launch = f"{sys.executable} {tmp_path}/program.py {{ranks}}"
    assert Supervisor(stages_of(config()), tmp_path, launch, [str(tmp_path)], policy).run() == 0
    assert "printed 'driver is gone" in capsys.readouterr().err


def test_an_available_that_hangs_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "_LONGEST_LOOK_S", 0.1)
    with pytest.raises(UserError, match="gave no answer"):
        supervise(tmp_path, [], available="sleep 60")


def test_it_starts_again_until_the_run_is_complete(tmp_path: Path) -> None:
    code, attempts = supervise(tmp_path, ["20 1", "60 137", "100 0"])
    assert code == 0
    assert [(attempt["first_step"], attempt["saved_step"]) for attempt in attempts] == [(0, 20), (20, 60), (60, 100)]
    assert [attempt["number"] for attempt in attempts] == [1, 2, 3]


@pytest.mark.parametrize(
    ("plan", "code", "starts"),
    [
        (["20 2"], 2, 1),  # an error that only a user mends
        (["20 130"], 130, 1),
        (["20 85"], 85, 1),  # asked to stop
        (["20 0", "40 0", "100 0"], 0, 3),  # a launcher that was killed ends with 0 too
        (["20 1", "20 1", "20 86", "100 0"], 86, 3),  # two without a newer checkpoint
        (["20 1", "20 1", "40 1", "40 1", "100 0"], 0, 5),
        (["20 0", "20 0", "20 0"], 1, 3),
    ],
)
def test_when_it_gives_up(tmp_path: Path, plan: list[str], code: int, starts: int) -> None:
    outcome, attempts = supervise(tmp_path, plan, max_fruitless=2)
    assert (outcome, len(attempts)) == (code, starts)


def test_restarts_are_counted(tmp_path: Path) -> None:
    code, attempts = supervise(tmp_path, ["20 1", "40 1", "60 1", "100 0"], max_restarts=2)
    assert (code, len(attempts)) == (1, 3)


def test_fewer_ranks_run_where_the_layout_allows(tmp_path: Path) -> None:
    available = tmp_path / "available"
    available.write_text("3")
    code, attempts = supervise(tmp_path, ["100 0"], available=f"cat {available}")
    assert (code, attempts[0]["ranks"]) == (0, 3)
    with pytest.raises(UserError, match=r"printed 'many.*must print a number"):
        supervise(tmp_path, ["100 0"], available="echo many")


@pytest.mark.parametrize(
    ("sections", "available", "least", "expected"),
    [
        ({}, 4, 1, 4),
        ({}, 5, 1, 4),  # 12 sequences
        ({}, 5, 5, None),
        ({"parallel": {"tensor": 2}}, 7, 1, 6),
        ({"parallel": {"tensor": 2}}, 1, 1, None),
        ({"stages": {"a": {"train": {"steps": 5}}, "b": {"parallel": {"context": 4}}}}, 7, 1, 4),
    ],
)
def test_the_largest_number_of_ranks(
    sections: dict[str, Any], available: int, least: int, expected: int | None
) -> None:
    assert largest_world(stages_of(config(**sections)), available, least) == expected


def test_no_layout_fits(tmp_path: Path) -> None:
    stages = stages_of(config(parallel={"tensor": 8}))
    with pytest.raises(UserError, match=r"from 1 to 4 fits parallel.tensor=8"):
        Supervisor(stages, tmp_path, "true", [], Policy(ranks=4))


def test_how_far_a_run_has_come(tmp_path: Path) -> None:
    assert (saved_step(tmp_path), made_step(tmp_path)) == (0, 0)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "latest").write_text("step_00000040\n")
    rows = [{"kind": "train", "step": 46}, {"kind": "train", "step": 47}, {"kind": "validation", "step": 50}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"kind": "tr')
    assert (saved_step(tmp_path), made_step(tmp_path)) == (40, 47)
    (tmp_path / "checkpoints" / "latest").write_text("../elsewhere")
    assert saved_step(tmp_path) == 0


def test_exit_codes_that_mean_a_signal() -> None:
    assert [signal_name(code) for code in (-9, 137, 247, 1, 143)] == ["SIGKILL", "SIGKILL", "SIGKILL", "", "SIGTERM"]
