"""Inputs, cases and error measures that the attention tests share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megazebra.attention import Packing, load_backend
from megazebra.pattern import AttentionSpec

CPU = torch.device("cpu")


def attention_spec(window: int | None, sinks: bool = False, softcap: float | None = None) -> AttentionSpec:
    # Attention never reads the rotary embedding.
    return AttentionSpec(window=window, rope=None, sinks=sinks, softcap=softcap)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Case:
    window: int | None
    S: int = 96
    T: int | None = None
    B: int = 1
    H: int = 4
    G: int = 2
    D: int = 32
    documents: Sequence[Sequence[int]] | None = None
    spans: tuple[Sequence[Sequence[int]], Sequence[Sequence[int]]] | None = None
    sinks: bool = False
    softcap: float | None = None
    q_factor: float = 1.0
    strided: bool = False
    name: str = field(default="", compare=False)

    def __str__(self) -> str:
        return self.name

    @property
    def spec(self) -> AttentionSpec:
        return attention_spec(self.window, self.sinks, self.softcap)

    def packing(self) -> Packing | None:
        if self.spans is not None:
            return Packing.from_spans(*self.spans)
        return None if self.documents is None else Packing.from_document_lengths(self.documents)

    def tensors(self, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
        """q, k, v (and sinks) as leaves that want gradients, and the gradient of the output."""
        random = torch.Generator().manual_seed(1234)
        T = self.T or self.S

        def normal(length: int, heads: int) -> Tensor:
            shape = (self.B, heads, length, self.D) if self.strided else (self.B, length, heads, self.D)
            x = torch.randn(shape, generator=random, dtype=torch.float64).to(dtype)
            return x.transpose(1, 2) if self.strided else x

        q, k, v, dout = normal(self.S, self.H), normal(T, self.G), normal(T, self.G), normal(self.S, self.H)
        leaves = [q * self.q_factor, k, v]
        if self.sinks:
            leaves.append(torch.randn(self.H, generator=random, dtype=torch.float64).to(dtype))
        return [leaf.detach().requires_grad_() for leaf in leaves], dout


CASES = [
    # Windows: one key, a few, all but one or exactly all keys, more than there are, no window.
    Case(1, name="window1"),
    Case(7, name="window7"),
    Case(95, name="window_S-1"),
    Case(96, name="window_S"),
    Case(1000, name="window_beyond_S"),
    Case(None, name="global"),
    # Heads, rows, widths.
    Case(7, H=8, G=2, D=64, B=3, name="gqa8:2_D64_B3"),
    Case(None, H=4, G=4, D=128, name="mha_D128"),
    Case(7, H=4, G=1, B=3, name="mqa_B3"),
    # Lengths that fill no block, and lengths of several blocks and tiles.
    Case(5, S=1, name="one_token"),
    Case(40, S=331, name="ragged_local"),
    Case(None, S=331, name="ragged_global"),
    Case(2047, S=2200, H=2, G=1, name="window_of_two_tiles"),
    # Keys that reach further left than the queries (a halo, a KV cache).
    Case(16, S=70, T=85, name="halo"),
    Case(16, S=1, T=85, name="decode_local"),
    Case(None, S=70, T=200, name="keys_before_global"),
    Case(500, S=70, T=200, name="keys_before_window_beyond"),
    # Packed documents: one-token ones, one over the whole row, boundaries anywhere.
    Case(None, B=2, documents=[[1, 1, 50, 44], [96]], name="documents_global"),
    Case(20, B=3, documents=[[30, 1, 65], [1] * 96, [64, 32]], name="documents_local"),
    Case(None, S=1300, H=2, G=1, documents=[[1200, 100]], name="documents_over_tiles"),
    Case(16, S=70, T=85, B=2, spans=([[0, 60, 10], [70]], [[3, 72, 10], [85]]), name="documents_in_halo"),
    Case(None, S=70, T=85, spans=([[0, 0, 70]], [[3, 5, 77]]), name="documents_left_of_queries"),
    # Options.
    Case(7, softcap=2.0, name="softcap_local"),
    Case(None, softcap=2.0, name="softcap_global"),
    Case(7, H=8, G=2, B=2, sinks=True, name="sinks_local"),
    Case(None, sinks=True, name="sinks_global"),
    Case(33, S=150, B=2, sinks=True, softcap=5.0, documents=[[100, 50], [149, 1]], name="everything"),
    Case(33, q_factor=30, name="large_logits"),
    Case(None, q_factor=30, sinks=True, name="large_logits_sinks"),
    Case(7, B=2, strided=True, name="strided"),
]


def forward_and_gradients(backend: str, case: Case, dtype: torch.dtype, rounded_to: torch.dtype) -> list[Tensor]:
    """out, dq, dk, dv (and dsinks) of inputs rounded to one dtype and computed from another."""
    leaves, dout = case.tensors(rounded_to)
    leaves = [leaf.detach().to(dtype).requires_grad_() for leaf in leaves]
    sinks = leaves[3] if case.sinks else None
    out = load_backend(backend).attend(*leaves[:3], spec=case.spec, packing=case.packing(), sinks_H=sinks)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout.to(dtype))]


def error(actual: Tensor, expected: Tensor, floor: Tensor) -> float:
    """Frobenius norm of the difference relative to the expected, or to `floor` where what's expected is (near) zero."""
    difference = (actual.double() - expected.double()).norm()
    return (difference / torch.maximum(expected.double().norm(), floor.double())).item()
