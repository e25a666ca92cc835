"""Which builder serves, and that it says why."""

from __future__ import annotations

import subprocess
import sys

SAY = "from megazebra.data.index import builder; print(builder.native() is None, builder.describe())"


def test_numpy_serves_where_it_is_asked_for() -> None:
    result = subprocess.run(
        [sys.executable, "-c", SAY], env={"MEGAZEBRA_INDEX_BUILDER": "numpy"}, capture_output=True, text=True
    )
    assert result.stdout == "True numpy, slower (turned off by MEGAZEBRA_INDEX_BUILDER=numpy)\n", result.stderr
