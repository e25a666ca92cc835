"""The compiled kernels where they were built, else numpy with the same results.

Functions that have a compiled twin ask `native()` each time. MEGAZEBRA_INDEX_BUILDER=numpy leaves the compiled ones
unused.
"""

from __future__ import annotations

import os
from types import ModuleType

_native: ModuleType | None = None
_reason = "asked for by MEGAZEBRA_INDEX_BUILDER=numpy"
if os.environ.get("MEGAZEBRA_INDEX_BUILDER") != "numpy":
    try:
        from megazebra.data.index import _index_builder as _native
    except ImportError as error:
        _reason = (
            f"no compiled index builder, which costs time only ({error}); install a C++ compiler and megazebra again"
        )


def native() -> ModuleType | None:
    """The compiled module, None where numpy serves."""
    return _native


def describe() -> str:
    """What builds the index, for the first lines of a run."""
    return "C++" if _native is not None else f"numpy: {_reason}"
