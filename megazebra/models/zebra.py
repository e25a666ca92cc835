"""ZebraModel: embedding, blocks with a pattern of global and local attention, norm, output layer.

Parameter names are Hugging Face's Llama names.
Legend: B batch, S sequence of this context-parallel rank, E width of the residual stream, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from megazebra.attention.packing import Packing
from megazebra.config.schema import ModelConfig, RopeConfig
from megazebra.context.replay import Replay
from megazebra.models.caching import Cache
from megazebra.models.layers import Block, CosSin, RMSNorm, recomputed
from megazebra.models.rope import cos_sin
from megazebra.models.runtime import ModelRuntime
from megazebra.parallel.collectives import enter_tensor_parallel
from megazebra.parallel.cross_entropy import Reduction, VocabParallelHead
from megazebra.parallel.linear import VocabParallelEmbedding
from megazebra.parallel.mesh import ParallelMesh
from megazebra.pattern import AttentionSpec


class ZebraDecoder(nn.Module):
    """Tokens to final hidden states, [B, S, E], or [B, S/tp, E] under sequence parallelism."""

    def __init__(
        self, config: ModelConfig, mesh: ParallelMesh, runtime: ModelRuntime, specs: Sequence[AttentionSpec]
    ) -> None:
        super().__init__()
        self.config = config
        self.runtime = runtime
        self.specs = tuple(specs)
        self.embed_tokens = VocabParallelEmbedding(
            config.vocab_size, config.hidden_size, mesh.tp, sequence_parallel=runtime.sequence_parallel
        )
        self.layers = nn.ModuleList(
            Block(config, spec, mesh, runtime, f"layers.{i}") for i, spec in enumerate(self.specs)
        )
        shared = mesh.tp if runtime.sequence_parallel else None
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, runtime, shared)

    def forward(
        self,
        tokens_BS: Tensor,
        positions_BS: Tensor,
        packing: Packing | None,
        seq_len: int,
        cache: Cache | None = None,
    ) -> Tensor:
        # Layers that share a RopeConfig share one table: two of them at most, unless the pattern names more.
        ropes = {spec.rope for spec in self.specs}
        tables = {rope: self._rope_table(rope, positions_BS, seq_len) for rope in ropes}
        recompute_blocks = self.runtime.recompute == "full" and torch.is_grad_enabled()
        x_BSE = self.embed_tokens(tokens_BS)
        caches = [None] * len(self.layers) if cache is None else cache.layers
        for layer, spec, kept in zip(self.layers, self.specs, caches, strict=True):
            inputs = (x_BSE, tables[spec.rope], packing)
            x_BSE = recomputed(layer, *inputs, Replay()) if recompute_blocks else layer(*inputs, cache=kept)
        return self.norm(x_BSE)

    def _rope_table(self, rope: RopeConfig, positions_BS: Tensor, seq_len: int) -> CosSin:
        return cos_sin(rope, self.config.head_size, positions_BS, seq_len) if rope.enabled else None


class ZebraModel(nn.Module):
    """A causal language model whose layers attend as `config.pattern` says.

    specs: one per layer, each with its strategy of context parallelism (`context.choice.resolve_specs`); None where
    there is one context-parallel rank.
    Weights are uninitialized until `models.initialization` fills them.
    """

    def __init__(
        self,
        config: ModelConfig,
        mesh: ParallelMesh,
        runtime: ModelRuntime,
        specs: Sequence[AttentionSpec] | None = None,
    ) -> None:
        super().__init__()
        self.mesh = mesh
        self.runtime = runtime
        self.model = ZebraDecoder(config, mesh, runtime, specs or config.attention_specs())
        self.lm_head = VocabParallelHead(
            config.vocab_size,
            config.hidden_size,
            mesh.tp,
            chunk=runtime.loss_chunk,
            softcap=config.final_logit_softcap,
        )
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(
        self,
        tokens_BS: Tensor,
        labels_BS: Tensor | None = None,
        positions_BS: Tensor | None = None,
        packing: Packing | None = None,
        reduction: Reduction = "sum",
        seq_len: int | None = None,
        cache: Cache | None = None,
        last_only: bool = False,
    ) -> Tensor:
        """Summed cross-entropy of this rank's tokens (fp32 scalar, the same on every tp rank).

        tokens_BS: int64 token ids, this context-parallel rank's part of every sequence. labels_BS: int64, already
        shifted, -100 where not counted; None returns the logits [B, S, V]. positions_BS: int64, counted from the
        sequence's first token where None; packed documents restart at 0. packing: documents of each whole row; None:
        one each. reduction: 'none' returns the loss of each token [B, S], without gradients; 'scores' also whether the
        label is the likeliest token, [2, B, S]. seq_len: tokens of a whole sequence without padding; None: all.

        cache: what was kept of the tokens before; these are the next ones. It knows positions, packing and seq_len, and
        there are no gradients. last_only: nothing but the last token of every row goes through the output layer, so
        that logits are [B, 1, V].
        """
        cp, S = self.mesh.cp, tokens_BS.shape[1]
        if cache is not None:
            positions_BS, seq_len = cache.begin(S), cache.capacity
        elif positions_BS is None:
            positions_BS = torch.arange(cp.rank * S, (cp.rank + 1) * S, device=tokens_BS.device).expand_as(tokens_BS)
        hidden_BSE = self.model(tokens_BS, positions_BS, packing, seq_len or S * cp.size, cache)
        hidden_BSE = enter_tensor_parallel(
            hidden_BSE, self.mesh.tp, sequence_parallel=self.runtime.sequence_parallel, label="lm_head"
        )
        if last_only:
            hidden_BSE = hidden_BSE[:, -1:]
        return self.lm_head(hidden_BSE, labels_BS, reduction)
