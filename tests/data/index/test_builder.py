"""Which builder serves, and that it says why."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest

from megazebra.data.index import builder

SAY = "from megazebra.data.index import builder; print(builder.native() is None, builder.describe())"


def test_numpy_serves_where_it_is_asked_for() -> None:
    result = subprocess.run(
        [sys.executable, "-c", SAY], env={"MEGAZEBRA_INDEX_BUILDER": "numpy"}, capture_output=True, text=True
    )
    assert result.stdout == "True numpy, asked for by MEGAZEBRA_INDEX_BUILDER\n", result.stderr


def test_without_a_compiled_module_numpy_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MEGAZEBRA_INDEX_BUILDER", raising=False)
    monkeypatch.setitem(sys.modules, "megazebra.data.index._index_builder", None)
    module, description = builder._load()
    assert module is None
    assert "install a C++ compiler, then megazebra again" in description


@pytest.mark.skipif(
    importlib.util.find_spec("megazebra.data.index._index_builder") is None, reason="nothing is compiled here"
)
def test_a_module_of_other_sources_is_left_unused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MEGAZEBRA_INDEX_BUILDER", raising=False)
    assert builder._load()[1] == "C++"
    monkeypatch.setattr(builder, "sources_digest", lambda: "another")
    assert builder._load() == (
        None,
        "numpy, slower (the compiled one is of other sources); run pip install -e . again",
    )
