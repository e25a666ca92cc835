"""No index, however damaged, may bring the process down; in a subprocess (fuzz_index.py), to survive if one does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megazebra.data.index.builder import describe, native

PROGRAM = Path(__file__).with_name("fuzz_index.py")
MUTANTS = 3000


@pytest.mark.parametrize("builder", ["compiled", "numpy"])
def test_mutated_indexes_are_refused_or_served(tmp_path, builder):
    if builder == "compiled" and native() is None:
        pytest.skip(describe())
    environment = {**os.environ, "MEGAZEBRA_INDEX_BUILDER": builder, "PYTHONPATH": str(PROGRAM.parents[3])}
    command = [sys.executable, str(PROGRAM), str(tmp_path), str(MUTANTS), "0"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, f"{done.returncode}\n{done.stderr}"
    outcomes = json.loads(done.stdout)
    assert sum(outcomes.values()) == 2 * MUTANTS
    assert min(outcomes.values()) > 0, outcomes
