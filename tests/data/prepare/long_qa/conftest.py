from __future__ import annotations

import random

import pytest


@pytest.fixture
def texts(tmp_path):
    """Twenty documents of short lines, and one that is a single long line."""
    folder = tmp_path / "texts"
    folder.mkdir()
    words = ["river", "stone", "under", "a", "grey", "sky", "they", "walk", "and", "nobody", "hears", "the", "wind"]
    draw = random.Random(0)
    for number in range(20):
        lines = (" ".join(draw.choices(words, k=draw.randint(2, 14))) for _ in range(60))
        (folder / f"{number:02}.txt").write_text("\n".join(lines) + "\n")
    (folder / "one_line.txt").write_text(" ".join(draw.choices(words, k=900)))
    return folder
