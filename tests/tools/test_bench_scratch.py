"""The scratch folder of a bench goes with the program, however that ends."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / "tools"
PROGRAM = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs begin with it ignored
from bench.scratch import scratch_folder
with scratch_folder("bench_some", sys.argv[1]) as folder:
    (folder / "large").write_text("file")
    print(folder, flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize(("stop", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, -signal.SIGINT)])
def test_it_is_gone_when_the_program_is_told_to_stop(tmp_path: Path, stop: signal.Signals, code: int) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(tmp_path)],
        cwd=TOOLS, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    folder = Path(process.stdout.readline().strip())
    assert folder.parent == tmp_path
    assert folder.name.startswith("bench_some_scratch_may_be_deleted_")
    assert (folder / "large").exists()
    process.send_signal(stop)
    assert process.wait(timeout=30) == code
    process.stdout.close()
    assert not list(tmp_path.iterdir())
