"""One call of windowed attention: its tensors, its operations, its timing and its correctness.

Shapes: B = 1 batch, S sequence, H query heads, G key/value heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bench.dtypes import DTYPES
from bench.measure import peak_bytes
from megazebra.attention import load_backend
from megazebra.attention.reference import attend as reference
from megazebra.config.schema import RopeConfig
from megazebra.pattern import AttentionSpec
from megazebra.plan.flops import attention_pairs

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
PASSES = {"fwd": False, "fwdbwd": True}  # whether the backward pass is included
BACKWARD_OVER_FORWARD = 2.5  # matrix products: five where forward has two

# Relative Frobenius error against float64. TF32 would not pass as fp32.
LARGEST_ERROR = {"fp32": 1e-5, "bf16": 1e-2}


@dataclass(frozen=True)
class Problem:
    """window counts the query itself; q_factor makes the softmax peaked."""

    S: int
    D: int
    dtype: str
    window: int
    H: int = 8
    G: int = 8
    q_factor: float = 1.0

    def __str__(self) -> str:
        heads = f"{self.H}" if self.H == self.G else f"{self.H}:{self.G}"
        peaked = "" if self.q_factor == 1 else f", q x {self.q_factor:g}"
        return f"{self.dtype} S={self.S} D={self.D} w={self.window} H={heads}{peaked}"

    def flops(self, backward: bool) -> float:
        """Of the pairs inside the band; a multiply-add is 2. What a kernel computes beyond them earns nothing."""
        forward = 4 * self.D * self.H * attention_pairs([self.S], self.window)
        return forward * (1 + BACKWARD_OVER_FORWARD) if backward else forward

    def tensors(self, device: torch.device, *, heads_first: bool = False) -> list[Tensor]:
        """q, k, v that want gradients and the gradient of the output: [1, S, H or G, D], or heads before S."""
        random = torch.Generator(device).manual_seed(1234)

        def normal(heads: int) -> Tensor:
            shape = (1, heads, self.S, self.D) if heads_first else (1, self.S, heads, self.D)
            return torch.randn(shape, generator=random, device=device)

        q, k, v, dout = (normal(heads) for heads in (self.H, self.G, self.G, self.H))
        dtype = DTYPES[self.dtype]
        leaves = [x.to(dtype).requires_grad_() for x in (q * self.q_factor, k, v)]
        return [*leaves, dout.to(dtype)]


def call(attend: Attend, tensors: list[Tensor], backward: bool) -> Callable[[], Any]:
    """What is timed: forward without a graph, or forward and backward."""
    *leaves, dout = tensors
    if backward:
        return lambda: torch.autograd.grad(attend(*leaves), leaves, dout)
    return torch.no_grad()(lambda: attend(*leaves))


def backend_attend(name: str, window: int) -> Attend:
    spec = AttentionSpec(window=window, rope=RopeConfig())  # attention does not read the rope
    attend = load_backend(name).attend
    return lambda q, k, v: attend(q, k, v, spec=spec)


def refusal(name: str, problem: Problem, device: torch.device) -> str | None:
    """Why the backend can't compute such a problem here; None when it can."""
    backend, spec = load_backend(name), AttentionSpec(window=problem.window, rope=RopeConfig())
    dtype = DTYPES[problem.dtype]
    return backend.unavailable(device) or backend.unsupported(spec, head_dim=problem.D, dtype=dtype, device=device)


def largest_error(attend: Attend, problem: Problem, device: torch.device) -> float:
    """Of out, dq, dk and dv against the dense reference in float64: relative Frobenius norms."""
    *leaves, dout = problem.tensors(device)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    spec = AttentionSpec(window=problem.window, rope=RopeConfig())
    out, expected = attend(*leaves), reference(*exact, spec=spec)
    actual = [out.detach(), *torch.autograd.grad(out, leaves, dout)]
    wanted = [expected.detach(), *torch.autograd.grad(expected, exact, dout.double())]
    return max(float((a.double() - w).norm() / w.norm()) for a, w in zip(actual, wanted, strict=True))


def check(name: str, problem: Problem, device: torch.device) -> str | None:
    """Why the backend's numbers must not be printed: refused, or wrong at a length the reference can afford."""
    small = replace(problem, S=331, window=min(problem.window, 100))
    if why := refusal(name, small, device):
        return why
    error, limit = largest_error(backend_attend(name, small.window), small, device), LARGEST_ERROR[problem.dtype]
    return None if error <= limit else f"it is wrong: relative error {error:.1e} where {limit:.0e} is allowed ({small})"


def peak_over_q(name: str, problem: Problem) -> float:
    """What forward and backward add to the memory at their peak (results and workspace), in sizes of q.

    For a fresh process, which holds nothing that could be used again.
    """
    torch.set_num_threads(1)
    cpu = torch.device("cpu")
    call(backend_attend(name, problem.window), replace(problem, S=64).tensors(cpu), True)()  # libraries, thread pools
    tensors = problem.tensors(cpu)
    return peak_bytes(call(backend_attend(name, problem.window), tensors, True)) / tensors[0].nbytes
