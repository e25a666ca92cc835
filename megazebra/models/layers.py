"""The block of a Zebra model: Llama's, with an attention of its own in every layer.

Legend: B batch, S sequence of this context-parallel rank, H query heads and G key/value heads of this tensor-parallel
rank, D head dim, E width of the residual stream, F width of the feed-forward layer on this rank.
With sequence parallelism the residual stream is [B, S/tp, E]; inside attention and MLP S is whole.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megazebra.attention.packing import Packing
from megazebra.config.schema import ModelConfig
from megazebra.context.replay import Replay
from megazebra.context.strategy import load_strategy
from megazebra.models.caching import LayerCache
from megazebra.models.rope import apply_rope
from megazebra.models.runtime import ModelRuntime
from megazebra.parallel.collectives import reduce_gradient
from megazebra.parallel.linear import ColumnParallelLinear, RowParallelLinear, split_evenly
from megazebra.parallel.mesh import Group, ParallelMesh
from megazebra.parallel.sharding import mark_sharded
from megazebra.pattern import AttentionSpec

CosSin = tuple[Tensor, Tensor] | None


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang and Sennrich 2019).

    sum_gradient_over: the group whose ranks apply this weight to different parts of the work.
    """

    def __init__(self, size: int, eps: float, runtime: ModelRuntime, sum_gradient_over: Group | None = None) -> None:
        super().__init__()
        self.eps = eps
        self.runtime = runtime
        self.group = sum_gradient_over
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight if self.group is None else reduce_gradient(self.weight, self.group, "norm")
        return self.runtime.elementwise.rms_norm(x, weight, self.eps)


class Attention(nn.Module):
    """Grouped-query attention of one layer, as its AttentionSpec says; heads are split over tp."""

    def __init__(
        self, config: ModelConfig, spec: AttentionSpec, mesh: ParallelMesh, runtime: ModelRuntime, name: str
    ) -> None:
        super().__init__()
        self.spec = spec
        self.runtime = runtime
        self.mesh = mesh
        self.head_dim = config.head_size
        self.attend = load_strategy(spec.context, mesh.cp)
        self.label = f"{name}.{spec.kind}"
        heads = split_evenly(config.num_attention_heads, mesh.tp, "model.num_attention_heads")
        split_evenly(config.kv_heads, mesh.tp, "model.num_kv_heads")
        query_size = config.num_attention_heads * config.head_size
        kv_size = config.kv_heads * config.head_size
        bias = config.attention_bias
        self.q_proj = ColumnParallelLinear(config.hidden_size, query_size, mesh.tp, bias=bias, name=f"{name}.q_proj")
        self.k_proj = ColumnParallelLinear(config.hidden_size, kv_size, mesh.tp, bias=bias, name=f"{name}.k_proj")
        self.v_proj = ColumnParallelLinear(config.hidden_size, kv_size, mesh.tp, bias=bias, name=f"{name}.v_proj")
        self.o_proj = RowParallelLinear(
            query_size,
            config.hidden_size,
            mesh.tp,
            bias=bias,
            sequence_parallel=runtime.sequence_parallel,
            name=self.label,
        )
        self.q_norm: RMSNorm | None = None
        self.k_norm: RMSNorm | None = None
        if config.qk_norm:  # one weight for all heads, of which a rank has some
            self.q_norm = RMSNorm(config.head_size, config.rms_norm_eps, runtime, sum_gradient_over=mesh.tp)
            self.k_norm = RMSNorm(config.head_size, config.rms_norm_eps, runtime, sum_gradient_over=mesh.tp)
        self.sinks: nn.Parameter | None = None
        if spec.sinks:
            self.sinks = nn.Parameter(torch.zeros(heads))
            mark_sharded(self.sinks, dim=0, full_size=config.num_attention_heads)

    def forward(
        self,
        x_BSE: Tensor,
        rope: CosSin,
        packing: Packing | None,
        replay: Replay | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        if replay is not None:
            replay.begin()
        entered = self.runtime.enter(x_BSE, self.mesh.tp, self.label)
        q_BSHD = self.q_proj(*entered).unflatten(-1, (-1, self.head_dim))
        k_BSGD = self.k_proj(*entered).unflatten(-1, (-1, self.head_dim))
        v_BSGD = self.v_proj(*entered).unflatten(-1, (-1, self.head_dim))
        del entered  # attention should not have to hold the whole input
        if self.q_norm is not None and self.k_norm is not None:
            q_BSHD, k_BSGD = self.q_norm(q_BSHD), self.k_norm(k_BSGD)
        q_BSHD = apply_rope(q_BSHD, rope, self.runtime.elementwise.rotate)
        k_BSGD = apply_rope(k_BSGD, rope, self.runtime.elementwise.rotate)
        if cache is not None:
            out_BSHD = cache.attend(q_BSHD, k_BSGD, v_BSGD, backend=self.runtime.backend, sinks_H=self.sinks)
            return self.o_proj(out_BSHD.flatten(2))
        out_BSHD = self.attend(
            q_BSHD,
            k_BSGD,
            v_BSGD,
            spec=self.spec,
            packing=packing,
            backend=self.runtime.backend,
            group=self.mesh.cp,
            sinks_H=self.sinks,
            label=f"{self.label}.{self.spec.context}",
            replay=replay,
        )
        return self.o_proj(out_BSHD.flatten(2))


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer 2020), features split over tp."""

    def __init__(self, config: ModelConfig, mesh: ParallelMesh, runtime: ModelRuntime, name: str) -> None:
        super().__init__()
        self.runtime = runtime
        self.tp = mesh.tp
        self.label = name
        size, width, bias = config.hidden_size, config.ffn_hidden_size, config.mlp_bias
        split_evenly(width, mesh.tp, "model.ffn_hidden_size")
        self.gate_proj = ColumnParallelLinear(size, width, mesh.tp, bias=bias, name=f"{name}.gate_proj")
        self.up_proj = ColumnParallelLinear(size, width, mesh.tp, bias=bias, name=f"{name}.up_proj")
        self.down_proj = RowParallelLinear(
            width, size, mesh.tp, bias=bias, sequence_parallel=runtime.sequence_parallel, name=name
        )

    def forward(self, x_BSE: Tensor) -> Tensor:
        entered = self.runtime.enter(x_BSE, self.tp, self.label)
        gate_BSF, up_BSF = self.gate_proj(*entered), self.up_proj(*entered)
        del entered
        if self.runtime.recompute == "selective" and torch.is_grad_enabled():
            return recomputed(self._down, gate_BSF, up_BSF)
        return self._down(gate_BSF, up_BSF)

    def _down(self, gate_BSF: Tensor, up_BSF: Tensor) -> Tensor:
        # Recomputed selectively, this stops at the product: backward needs the projection's input, not
        # its output, so neither the matrix product nor the collective after it runs a second time.
        return self.down_proj(self.runtime.elementwise.swiglu(gate_BSF, up_BSF))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); x is [B, S, E], or [B, S/tp, E] under sequence parallelism."""

    def __init__(
        self, config: ModelConfig, spec: AttentionSpec, mesh: ParallelMesh, runtime: ModelRuntime, name: str
    ) -> None:
        super().__init__()
        shared = mesh.tp if runtime.sequence_parallel else None
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, runtime, shared)
        self.self_attn = Attention(config, spec, mesh, runtime, f"{name}.self_attn")
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, runtime, shared)
        self.mlp = SwiGLU(config, mesh, runtime, f"{name}.mlp")

    def forward(
        self,
        x_BSE: Tensor,
        rope: CosSin,
        packing: Packing | None,
        replay: Replay | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        x_BSE = x_BSE + self.self_attn(self.input_layernorm(x_BSE), rope, packing, replay, cache)
        return x_BSE + self.mlp(self.post_attention_layernorm(x_BSE))


def recomputed(function: Any, *inputs: Any) -> Tensor:
    """The function's result; its intermediate activations are computed again in backward."""
    # No dropout anywhere, so there is no random state to restore.
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)
