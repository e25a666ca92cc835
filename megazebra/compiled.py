"""The compiled modules of the package (csrc/): loaded where they were built from the sources that are there.

Nothing is lost without one, only time: whoever loads a module has something slower that gives the same results.
"""

from __future__ import annotations

import hashlib
import importlib
import os
from pathlib import Path
from types import ModuleType

SOURCES = Path(__file__).parents[1] / "csrc"  # there in a checkout only


def sources_digest(name: str) -> str:
    """What the module built from csrc/NAME carries as `sources`: a change of its C++ files shows."""
    digest = hashlib.sha256()
    for path in sorted((SOURCES / name).glob("*.[ch]pp")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def load_compiled(module: str, name: str, *, switch: str, off: str) -> ModuleType | str:
    """The module built from csrc/NAME, or why it can't serve. The environment's SWITCH=OFF leaves it unused."""
    if os.environ.get(switch) == off:
        return f"turned off by {switch}={off}"
    try:
        compiled = importlib.import_module(module)
    except ImportError as error:
        return f"{error}; install a C++ compiler, then megazebra again"
    if (SOURCES / name).is_dir() and getattr(compiled, "sources", None) != sources_digest(name):
        return "the compiled one is of other sources; run pip install -e . again"
    return compiled
