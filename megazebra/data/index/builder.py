"""The compiled kernels where they were built, else numpy with the same results.

Functions that have a compiled twin ask `native()` each time. MEGAZEBRA_INDEX_BUILDER=numpy leaves the compiled ones
unused.
"""

from __future__ import annotations

from types import ModuleType

from megazebra.compiled import load_compiled

_loaded = load_compiled(
    "megazebra.data.index._index_builder", "index_builder", switch="MEGAZEBRA_INDEX_BUILDER", off="numpy"
)
_native = None if isinstance(_loaded, str) else _loaded


def native() -> ModuleType | None:
    """The compiled module, None where numpy serves."""
    return _native


def describe() -> str:
    """What builds the index, for the first lines of a run."""
    return f"numpy, slower ({_loaded})" if isinstance(_loaded, str) else "C++"
