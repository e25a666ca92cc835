"""A little of fuzz_inputs.py in every run of the tests; and that it would find what it looks for."""

from __future__ import annotations

import os
import pickle
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import fuzz_inputs
import pytest
from fuzz_inputs import Outcome, limits, run_forked, sound_files
from fuzz_targets import TARGETS, Target

from megazebra.errors import UserError

# A report takes a second: it is left to the command.
CASES = {name: 20 for name in TARGETS if name != "report"} | {"config": 8, "torch_file": 8}


@pytest.mark.parametrize("name", list(CASES))
def test_files_made_wrong_are_refused_or_read(name: str) -> None:
    outcome = Outcome()
    with sound_files(TARGETS[name]) as folder:
        for number in range(CASES[name]):
            outcome.run(TARGETS[name], folder / "sound", folder / "case", seed=9, number=number)
    assert outcome.findings == {}
    assert outcome.cases == CASES[name]
    assert outcome.errors or name == "run", "mutations that nothing notices prove nothing"


class _Trap:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", list(CASES))
def test_a_pickle_in_place_of_a_file_is_not_opened(name: str, tmp_path: Path) -> None:
    sprung = tmp_path / "sprung"
    trap = pickle.dumps(_Trap(sprung))
    with sound_files(TARGETS[name]) as folder:
        for file in sorted(path for path in (folder / "case").rglob("*") if path.is_file()):
            content = file.read_bytes()
            file.write_bytes(trap)
            with limits(), suppress(UserError, ValueError, OSError):
                TARGETS[name].read(folder / "case")
            file.write_bytes(content)
    assert not sprung.exists()
    pickle.loads(trap)
    assert sprung.exists(), "the trap would have sprung"


def _raises(error: BaseException) -> Callable[[Path], None]:
    def read(_: Path) -> None:
        raise error

    return read


def _hangs(_: Path) -> None:
    while True:
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("read", "finding"),
    [
        (_raises(KeyError("entry")), "KeyError: 'entry'"),
        (_raises(ValueError("raised outside of the package")), "ValueError"),
        (lambda _: bytearray(1 << 40), "MemoryError"),
        (_hangs, "TooLongError"),
        (_raises(UserError("is no file of ours")), None),
        (lambda _: None, None),
    ],
)
def test_what_is_found(
    read: Callable[[Path], None], finding: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fuzz_inputs, "CASE_SECONDS", 0.2)
    (tmp_path / "sound").mkdir()
    (tmp_path / "sound" / "file.json").write_text("{}")
    outcome = Outcome()
    as_it_should_be = outcome.run(
        Target("made up", lambda _: None, read), tmp_path / "sound", tmp_path / "case", seed=0, number=5
    )
    assert as_it_should_be == (finding is None)
    assert list(outcome.findings) == ([] if finding is None else [5])
    assert finding is None or finding in outcome.findings[5]


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # a fork beside threads, which the child lacks
def test_a_process_that_dies_is_found(tmp_path: Path) -> None:
    (tmp_path / "sound").mkdir()
    (tmp_path / "sound" / "file.json").write_text("{}")

    def read(_: Path) -> None:
        if (tmp_path / "current").read_text() == "7":
            os.kill(os.getpid(), signal.SIGKILL)

    target = Target("made up", lambda _: None, read)
    outcome = run_forked(target, tmp_path, 0, range(5, 50), tmp_path / "keep", deadline=float("inf"))
    assert outcome.cases == 3
    assert outcome.findings == {7: f"the process died: signal {int(signal.SIGKILL)}"}
    assert (tmp_path / "keep" / "made up-0-7" / "file.json").exists()
