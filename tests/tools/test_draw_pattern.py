"""The picture of a pattern is drawn from the mask the oracle uses, and counts what the FLOP formula counts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

TOOL = Path(__file__).parents[2] / "tools" / "draw_pattern.py"


def test_draws_a_group_with_packed_documents(tmp_path: Path) -> None:
    picture = tmp_path / "new folder" / "pattern.png"
    subprocess.run(
        [
            sys.executable,
            str(TOOL),
            "--pattern",
            "GL",
            "--window",
            "3",
            "--documents",
            "5",
            "7",
            "--output",
            str(picture),
        ],
        check=True,
    )  # the tool asserts that mask and formula agree
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in picture.parent.iterdir()] == ["pattern.png"]
