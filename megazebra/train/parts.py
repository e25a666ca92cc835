"""The parts of a training step, told to a watcher while they run.

The marks are put on a model that stands, and taken off again: a step that nobody measures pays nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from megazebra.models.layers import Attention, RMSNorm, SwiGLU
from megazebra.models.zebra import ZebraModel
from megazebra.parallel.traffic import Watcher
from megazebra.train.engine import TrainEngine

REST = "the rest"


@contextmanager
def marked(engine: TrainEngine, watcher: Watcher) -> Iterator[None]:
    """Within, the watcher is told of every part of the model, forward and backward, of collectives and the update."""
    with ExitStack() as marks:

        def mark(owner: Any, name: str, part: str) -> None:
            marks.enter_context(part_marked(owner, name, part, watcher))

        for module in engine.module.modules():
            if isinstance(module, ZebraModel):
                mark(module.model.embed_tokens, "forward", "embedding")
                mark(module.lm_head, "forward", "output layer, loss")
            elif isinstance(module, RMSNorm):
                mark(module, "forward", "RMSNorm")
            elif isinstance(module, Attention):
                mark(module, "attend", f"attention, {module.spec.kind} layers")
                for projection in (module.q_proj, module.k_proj, module.v_proj, module.o_proj):
                    mark(projection, "forward", "attention, projections")
            elif isinstance(module, SwiGLU):
                for projection in (module.gate_proj, module.up_proj, module.down_proj):
                    mark(projection, "forward", "MLP, projections")
            if isinstance(module, Attention | SwiGLU):
                functions = module.runtime.elementwise
                told = SimpleNamespace(
                    rms_norm=functions.rms_norm,  # of RMSNorm, which is marked itself
                    swiglu=telling(watcher, "MLP, SwiGLU product", functions.swiglu),
                    rotate=telling(watcher, "RoPE", functions.rotate),
                )
                marks.enter_context(replaced(module, "runtime", replace(module.runtime, elementwise=told)))
        mark(engine.deepspeed, "step", "optimizer")
        watchers = engine.mesh.traffic.watchers
        watchers.append(watcher)
        marks.callback(watchers.remove, watcher)
        yield


@contextmanager
def part_marked(owner: Any, name: str, part: str, watcher: Watcher) -> Iterator[None]:
    """Within, calls of the owner's method are told as the part."""
    with replaced(owner, name, telling(watcher, part, getattr(owner, name))):
        yield


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Within, the object has an attribute of its own in place of what it had."""
    own = name in vars(owner)
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if own:
            setattr(owner, name, before)
        else:
            delattr(owner, name)


def telling(watcher: Watcher, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, as it is; the watcher is told when it and its backward begin and end."""

    def call(*args: Any, **kwargs: Any) -> Any:
        differentiable = [i for i, x in enumerate(args) if isinstance(x, Tensor) and x.requires_grad]
        backward = torch.is_grad_enabled() and bool(differentiable)
        if backward:
            told = _EndOfBackward.apply(watcher, part, *(args[i] for i in differentiable))
            args = tuple(told[differentiable.index(i)] if i in differentiable else x for i, x in enumerate(args))
        watcher.enter(part)
        try:
            out = function(*args, **kwargs)
        finally:  # a recomputation ends with an exception, once it has all that it needs
            watcher.leave(part)
        return _BeginOfBackward.apply(watcher, part, out) if backward and isinstance(out, Tensor) else out

    return call


class _EndOfBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, watcher: Watcher, part: str, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.watcher, ctx.part = watcher, part
        return tuple(x.view_as(x) for x in inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ctx.watcher.leave(ctx.part)
        return None, None, *grads


class _BeginOfBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, watcher: Watcher, part: str, out: Tensor) -> Tensor:
        ctx.watcher, ctx.part = watcher, part
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, Tensor]:
        ctx.watcher.enter(ctx.part)
        return None, None, grad


def table(seconds: Mapping[str, float], steps: int) -> list[str]:
    """Lines with the time of every part in a step, the longest first. seconds: over all `steps` of them."""
    whole = sum(seconds.values())
    parts = sorted(seconds.items(), key=lambda item: -item[1])
    lines = [f"{part:<26}{s / steps * 1e3:>12,.1f} ms{s / whole:>8.1%}" for part, s in parts]
    return [*lines, f"{'a step':<26}{whole / steps * 1e3:>12,.1f} ms"]
