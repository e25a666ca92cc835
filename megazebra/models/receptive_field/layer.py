"""One layer's attention under a layout: which queries show a token, and which tokens a query's gradient reaches.

Legend: B rows, S tokens of a whole row, H query heads, G key/value heads, E channels (`marks` says what they are for).
"""

from __future__ import annotations

import torch
from torch import Tensor

from megazebra.attention.packing import Packing
from megazebra.config.schema import Config
from megazebra.models.layers import Attention
from megazebra.models.receptive_field.findings import Seen
from megazebra.models.receptive_field.marks import SEED, hear_marks, narrowed
from megazebra.models.receptive_field.scenes import Documents, Place
from megazebra.models.rope import cos_sin
from megazebra.models.runtime import ModelRuntime
from megazebra.parallel.collectives import all_gather
from megazebra.parallel.mesh import ParallelMesh
from megazebra.pattern import AttentionSpec


class Shards:
    """A rank's part of tensors [B, S, ...] of the residual stream, and whole ones from the parts."""

    def __init__(self, mesh: ParallelMesh, sequence_parallel: bool) -> None:
        self.groups = [mesh.cp, mesh.tp] if sequence_parallel else [mesh.cp]

    def part(self, whole: Tensor) -> Tensor:
        for group in self.groups:
            whole = whole.chunk(group.size, dim=1)[group.rank]
        return whole

    def whole(self, part: Tensor) -> Tensor:
        for group in reversed(self.groups):
            part = all_gather(part, group, dim=1, label="receptive field")
        return part


def run_dtype(config: Config) -> torch.dtype:
    return torch.bfloat16 if config.train.precision == "bf16" else torch.float32


class ProbedLayer:
    """The attention of layers of one kind as training builds it, on whole rows that every rank knows."""

    def __init__(
        self,
        config: Config,
        spec: AttentionSpec,
        mesh: ParallelMesh,
        runtime: ModelRuntime,
        device: torch.device,
        documents: Documents,
    ) -> None:
        model = narrowed(config).model
        self.heads, self.kv_heads = model.num_attention_heads, model.kv_heads
        self.attention = Attention(model, spec, mesh, runtime, "probe").to(device, run_dtype(config))
        self.attention.requires_grad_(False)
        B, S = documents.start_BS.shape
        hear_marks(self.attention, self.heads, self.kv_heads, mesh.tp, min(spec.window or S, S))
        self.shards = Shards(mesh, runtime.sequence_parallel)
        self.packing: Packing | None = None
        if any(len(row) > 1 for row in documents.lengths):
            self.packing = Packing.from_document_lengths(documents.lengths, device)
        self.rope = None
        if spec.rope.enabled:
            positions_BS = torch.from_numpy(documents.positions()).to(device)
            own_BS = positions_BS.chunk(mesh.cp.size, dim=1)[mesh.cp.rank]
            self.rope = cos_sin(spec.rope, model.head_size, own_BS, config.data.seq_len)
        generator = torch.Generator().manual_seed(SEED)
        x_BSE = torch.randn((B, S, model.hidden_size), generator=generator)
        self.x_BSE = x_BSE.to(device, run_dtype(config))

    def outputs(self, token: Place) -> Seen:
        """The queries whose output the token's value is in."""
        x_BSE = self.x_BSE.clone()
        x_BSE[..., : self.heads] = 0
        x_BSE[(*token, slice(self.heads))] = 1
        with torch.no_grad():
            out_BSE = self.attention(self.shards.part(x_BSE), self.rope, self.packing)
        return seen(self.shards, out_BSE != 0, self.heads)

    def gradients(self, query: Place) -> Seen:
        """The tokens that have a gradient from the query's output: by values in every head, by keys in any."""
        x_BSE = self.shards.part(self.x_BSE).clone().requires_grad_()
        dout_BSE = torch.zeros_like(self.x_BSE)
        dout_BSE[(*query, slice(self.heads))] = 1
        out_BSE = self.attention(x_BSE, self.rope, self.packing)
        (dx_BSE,) = torch.autograd.grad(out_BSE, x_BSE, self.shards.part(dout_BSE))
        return seen(self.shards, dx_BSE != 0, self.kv_heads)


def seen(shards: Shards, influenced_BSE: Tensor, heads: int) -> Seen:
    """From this rank's part of bools: the first `heads` channels are those of heads."""
    # As numbers, which every collective can carry.
    counts_BS2 = torch.stack([influenced_BSE[..., :heads].sum(-1), influenced_BSE.sum(-1)], dim=-1)
    in_heads_BS, in_all_BS = shards.whole(counts_BS2).cpu().unbind(-1)
    return Seen((in_all_BS > 0).numpy(), in_heads_BS.numpy(), heads)
