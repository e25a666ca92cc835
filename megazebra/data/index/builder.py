"""The compiled kernels where they were built, else numpy with the same results.

Functions that have a compiled twin ask `native()` each time. MEGAZEBRA_INDEX_BUILDER=numpy leaves the compiled ones
unused.
"""

from __future__ import annotations

import hashlib
import importlib
import os
from pathlib import Path
from types import ModuleType

SOURCES = Path(__file__).parents[3] / "csrc" / "index_builder"  # there in a checkout only


def sources_digest() -> str:
    """What the compiled module carries as `sources`: a change of the C++ files shows."""
    digest = hashlib.sha256()
    for path in sorted(SOURCES.glob("*.[ch]pp")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _load() -> tuple[ModuleType | None, str]:
    if os.environ.get("MEGAZEBRA_INDEX_BUILDER") == "numpy":
        return None, "numpy, asked for by MEGAZEBRA_INDEX_BUILDER"
    try:
        module = importlib.import_module("megazebra.data.index._index_builder")
    except ImportError as error:
        return None, f"numpy, slower ({error}); install a C++ compiler, then megazebra again"
    if SOURCES.is_dir() and getattr(module, "sources", None) != sources_digest():
        return None, "numpy, slower (the compiled one is of other sources); run pip install -e . again"
    return module, "C++"


_native, _description = _load()


def native() -> ModuleType | None:
    """The compiled module, None where numpy serves."""
    return _native


def describe() -> str:
    """What builds the index, for the first lines of a run."""
    return _description
