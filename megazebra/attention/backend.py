"""Which kernel computes attention. Every module of this folder that is not a helper (`config.backends`) is a backend.

A backend is one file with three functions, described by `Backend`; the contract tests run over the folder.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor

from megazebra.attention.packing import Packing
from megazebra.config.backends import attention_backend_names
from megazebra.pattern import AttentionSpec

# Best first; the last one runs everywhere. triton is asked for by name: its kernels have never run on a GPU.
AUTO_ORDER = {"cuda": ("flash", "flex", "blocked")}
AUTO_ORDER_ELSEWHERE = ("simd", "blocked")


class Backend(Protocol):
    """What a backend's file must hold."""

    def unavailable(self, device: torch.device) -> str | None:
        """Why the backend can't train on this device here; None when it can."""

    def unsupported(
        self, spec: AttentionSpec, *, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> str | None:
        """Why an available backend can't compute such layers; None when it can."""

    def attend(
        self,
        q_BSHD: Tensor,
        k_BTGD: Tensor,
        v_BTGD: Tensor,
        *,
        spec: AttentionSpec,
        packing: Packing | None = None,
        sinks_H: Tensor | None = None,
    ) -> Tensor:
        """Attention under the package's mask, scaled by 1/sqrt(D); [B, S, H, D] in q's dtype, or a ValueError."""


@dataclass(frozen=True)
class BackendChoice:
    """The backend that was picked, its `attend`, and a sentence for the log that says why."""

    name: str
    attend: Callable[..., Tensor]
    reason: str


def backend_names() -> tuple[str, ...]:
    """Backends in this folder, sorted."""
    return attention_backend_names()


def load_backend(name: str) -> Backend:
    """Raises ValueError when there is no such backend."""
    if name not in backend_names():
        raise ValueError(f"no attention backend {name!r}; choose auto or one of {', '.join(backend_names())}")
    return cast(Backend, importlib.import_module(f"megazebra.attention.{name}"))


def resolve_backend(
    name: str, specs: Iterable[AttentionSpec], *, head_dim: int, dtype: torch.dtype, device: torch.device
) -> BackendChoice:
    """One backend for all layers. Only 'auto' falls back, to the best that can compute every spec.

    Raises ValueError when the backend asked for by name is unknown, unavailable or can't compute a spec.
    """
    distinct_specs = tuple(dict.fromkeys(specs))

    def refusal(backend: Backend) -> str | None:
        reasons = (backend.unsupported(spec, head_dim=head_dim, dtype=dtype, device=device) for spec in distinct_specs)
        return backend.unavailable(device) or next((reason for reason in reasons if reason), None)

    if name != "auto":
        backend = load_backend(name)
        if why := refusal(backend):
            raise ValueError(f"attention backend {name!r} was asked for but {why}; mend that or use 'auto'")
        return BackendChoice(name, backend.attend, f"attention backend {name}: asked for by name")

    passed_over: list[str] = []
    for candidate in AUTO_ORDER.get(device.type, AUTO_ORDER_ELSEWHERE):
        backend = load_backend(candidate)
        why = refusal(backend)
        if why is None:
            because = f"not {'; not '.join(passed_over)}" if passed_over else f"the best on {device.type}"
            return BackendChoice(candidate, backend.attend, f"attention backend {candidate}: {because}")
        passed_over.append(f"{candidate}, because {why}")
    raise ValueError(f"no attention backend runs here: not {'; not '.join(passed_over)}")
