"""Which attention backends there are, without importing them (they import torch)."""

from __future__ import annotations

from pathlib import Path

_FOLDER = Path(__file__).parent.parent / "attention"
# The modules of that folder that are no backend.
_HELPERS = {"__init__", "backend", "inputs", "packing", "triton_blocks", "triton_kernels"}


def attention_backend_names() -> tuple[str, ...]:
    """The modules of megazebra/attention that hold a backend, sorted."""
    return tuple(sorted({file.stem for file in _FOLDER.glob("*.py")} - _HELPERS))
