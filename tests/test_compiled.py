"""Loading of compiled modules: what serves, and that it says why."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

import pytest

from megazebra import compiled

MODULE = "megazebra.data.index._index_builder"
HERE = importlib.util.find_spec(MODULE) is not None


def load() -> ModuleType | str:
    return compiled.load_compiled(MODULE, "index_builder", switch="SWITCH_OF_A_TEST", off="no")


def test_the_environment_can_turn_it_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWITCH_OF_A_TEST", "no")
    assert load() == "turned off by SWITCH_OF_A_TEST=no"


def test_what_was_not_compiled_says_how_to_mend_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, MODULE, None)
    assert "install a C++ compiler, then megazebra again" in str(load())


@pytest.mark.skipif(not HERE, reason="nothing is compiled here")
def test_a_module_of_other_sources_is_left_unused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(load(), ModuleType)
    monkeypatch.setattr(compiled, "sources_digest", lambda name: "another")
    assert load() == "the compiled one is of other sources; run pip install -e . again"


def test_every_source_counts(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "SOURCES", tmp_path)
    (tmp_path / "kernel").mkdir()
    header = tmp_path / "kernel" / "a.hpp"
    header.write_text("one")
    first = compiled.sources_digest("kernel")
    header.write_text("two")
    assert compiled.sources_digest("kernel") != first
    (tmp_path / "kernel" / "notes.txt").write_text("no source")
    assert compiled.sources_digest("kernel") not in (first, compiled.sources_digest("absent"))
