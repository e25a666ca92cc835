"""The compiled kernels where they were built, else numpy with the same results.

Functions that have a compiled twin ask `native()` each time. MEGAZEBRA_INDEX_BUILDER=numpy leaves the compiled ones
unused.
"""

from __future__ import annotations

import importlib
import os
from types import ModuleType


def _load() -> tuple[ModuleType | None, str]:
    if os.environ.get("MEGAZEBRA_INDEX_BUILDER") == "numpy":
        return None, "numpy, asked for by MEGAZEBRA_INDEX_BUILDER"
    try:
        return importlib.import_module("megazebra.data.index._index_builder"), "C++"
    except ImportError as error:
        return None, f"numpy, slower ({error}); install a C++ compiler, then megazebra again"


_native, _description = _load()


def native() -> ModuleType | None:
    """The compiled module, None where numpy serves."""
    return _native


def describe() -> str:
    """What builds the index, for the first lines of a run."""
    return _description
