"""What the end-to-end tests share."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest
from support.command_line import ROOT


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus made by the tool users call, of text that no commit changes."""
    folder = tmp_path_factory.mktemp("corpus")
    subprocess.run(
        [
            sys.executable, str(ROOT / "tools" / "preprocess_data.py"), "--input", str(Path(asyncio.__file__).parent),
            "--glob", "*.py", "--output", str(folder), "--train-tokenizer", "512", "--validation-share", "0.2",
        ],
        check=True,
        capture_output=True,
    )  # fmt: skip
    return folder
