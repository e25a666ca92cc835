"""Processes that hang on purpose, without torch: who notices, what they leave, and how they end."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from pathlib import Path

from megazebra.launch import HANG_EXIT_CODE
from megazebra.train.watchdog import FOLDER, SUMMARY, Watchdog, place, ranks_in_words, summary

TIMEOUT_S = 1.0
HEAD = """
import sys, threading, time
from pathlib import Path
from megazebra.train.watchdog import Watchdog

def stand_still():
    time.sleep(60)

def work(watchdog):
    for step in range(600):
        watchdog.phase(f"step {step}")
        time.sleep(0.1)

folder = Path(sys.argv[1])
"""


def start(folder: Path, rank: int, body: str) -> subprocess.Popen[str]:
    """A rank of two whose watchdog watches, and that does `body`."""
    program = f"{HEAD}watchdog = Watchdog({rank}, 2)\nwatchdog.watch(folder, {TIMEOUT_S})\n{body}\n"
    return subprocess.Popen([sys.executable, "-c", program, str(folder)], stderr=subprocess.PIPE, text=True)


def end(*ranks: subprocess.Popen[str]) -> tuple[list[int], str]:
    errors = [rank.communicate(timeout=60)[1] for rank in ranks]
    return [rank.returncode for rank in ranks], "".join(errors)


def test_one_rank_stands_still_and_all_end(tmp_path: Path) -> None:
    """Rank 0 goes on, and hears of it."""
    healthy = "(folder / 'ready').touch()\nwork(watchdog)"
    hanging = "while not (folder / 'ready').exists():\n    time.sleep(0.01)\nwatchdog.phase('step 7')\nstand_still()"
    codes, errors = end(start(tmp_path, 0, healthy), start(tmp_path, 1, hanging))
    assert codes == [HANG_EXIT_CODE, HANG_EXIT_CODE]
    assert "rank 1 is in no code of ours [step 7]" in errors
    assert "stand_still" in (tmp_path / FOLDER / "rank_1.txt").read_text()
    assert "Thread MainThread" in (tmp_path / FOLDER / "rank_0.txt").read_text()
    assert (tmp_path / FOLDER / SUMMARY).read_text() == errors, "said once, and kept"


def test_a_rank_that_cannot_answer_is_named_and_old_stacks_mean_nothing(tmp_path: Path) -> None:
    (tmp_path / FOLDER).mkdir()
    (tmp_path / FOLDER / "rank_1.txt").write_text("rank 1 on a, pid 1: step 1\nof an earlier hang\n")
    codes, errors = end(start(tmp_path, 0, "watchdog.phase('step 7')\nstand_still()"))
    assert codes == [HANG_EXIT_CODE]
    assert "rank 1 does not answer: stopped, or gone with the host" in errors


def test_a_folder_that_cannot_be_written_does_not_keep_a_rank_alive(tmp_path: Path) -> None:
    (tmp_path / FOLDER).write_text("no folder")
    codes, errors = end(start(tmp_path, 0, "watchdog.phase('step 7')\nstand_still()"))
    assert codes == [HANG_EXIT_CODE]
    assert "rank 0 is in" in errors


def test_it_watches_no_longer(tmp_path: Path) -> None:
    watchdog = Watchdog(0, 1)
    watchdog.watch(tmp_path, 0)
    assert "watchdog" not in {thread.name for thread in threading.enumerate()}, "0 is off"
    watchdog.watch(tmp_path, 60)
    assert "watchdog" in {thread.name for thread in threading.enumerate()}
    watchdog.close()
    assert "watchdog" not in {thread.name for thread in threading.enumerate()}
    assert list(tmp_path.iterdir()) == []


def test_a_phase_may_have_more_patience(tmp_path: Path) -> None:
    body = f"watchdog.phase('saving', patience=100)\ntime.sleep({2 * TIMEOUT_S})\nwatchdog.close()"
    assert end(start(tmp_path, 0, body)) == ([0], "")


def test_the_summary_groups_ranks() -> None:
    lines = list(
        summary(
            {0: ["rank 0 on a, pid 1: step 3", "all_reduce (loss)"],
             1: ["rank 1 on a, pid 2: step 3", "all_reduce (loss)"],
             3: ["rank 3 on b, pid 1: step 3", "next_step (megazebra/data/loader.py:60)"]},
            6, Path("run/stacks"),
        )
    )  # fmt: skip
    assert lines[1:] == [
        "  ranks 0-1 are in all_reduce (loss) [step 3]",
        "  rank 3 is in next_step (megazebra/data/loader.py:60) [step 3]",
        "  ranks 2, 4-5 do not answer: stopped, or gone with the host",
    ]


def test_ranks_in_words() -> None:
    assert ranks_in_words([4]) == "rank 4"
    assert ranks_in_words([0, 1, 2, 5, 7, 8]) == "ranks 0-2, 5, 7-8"


def test_a_place_is_that_of_our_code(tmp_path: Path) -> None:
    """The watchdog's own thread waits in the standard library, called by us."""
    watchdog = Watchdog(0, 1)
    watchdog.watch(tmp_path, 60)
    thread = next(thread for thread in threading.enumerate() if thread.name == "watchdog")
    assert thread.ident is not None
    assert re.fullmatch(r"_run \(megazebra/train/watchdog.py:\d+\)", place(sys._current_frames()[thread.ident]) or "")
    watchdog.close()
    assert place(None) is None
