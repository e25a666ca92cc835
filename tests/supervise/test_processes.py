"""A launcher's processes are found and ended, also when the launcher is gone."""

from __future__ import annotations

import time
from pathlib import Path

from megazebra.supervise.processes import Job


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_orphans_are_killed_even_stopped_ones(tmp_path: Path) -> None:
    child = f"touch {tmp_path}/$1; kill -STOP $$; sleep 600"
    job = Job(["sh", "-c", f"sh -c '{child}' - a & sh -c '{child}' - b & exit 0"])
    wait_for(tmp_path / "a")
    wait_for(tmp_path / "b")
    while job.exit_code() is None:
        time.sleep(0.01)
    assert job.exit_code() == 0
    assert job.end(patience_s=0.0) == 2
    assert job.end(patience_s=0.0) == 0


def test_ranks_in_sessions_of_their_own_are_found(tmp_path: Path) -> None:
    """As torchrun starts them."""
    job = Job(["sh", "-c", f"RANK=0 setsid sh -c 'touch {tmp_path}/ready; sleep 600' & exit 0"])
    wait_for(tmp_path / "ready")
    assert job.end(patience_s=0.0) >= 1
    assert job.end(patience_s=0.0) == 0


def test_the_lowest_rank_is_asked_to_stop(tmp_path: Path) -> None:
    (tmp_path / "rank.sh").write_text(
        f"trap 'touch {tmp_path}/asked_$RANK; exit 85' USR1; touch {tmp_path}/ready_$RANK\n"
        "while true; do sleep 0.01; done"
    )
    job = Job(["sh", "-c", f"RANK=1 sh {tmp_path}/rank.sh & RANK=0 sh {tmp_path}/rank.sh; exit $?"])
    wait_for(tmp_path / "ready_0")
    wait_for(tmp_path / "ready_1")
    job.ask_to_stop()
    wait_for(tmp_path / "asked_0")
    while job.exit_code() is None:
        time.sleep(0.01)
    assert job.exit_code() == 85
    assert job.end(patience_s=0.0) >= 1, "rank 1, which sleeps or does not"
    assert not (tmp_path / "asked_1").exists()
