"""What a forward pass keeps for backward on one rank, by layer. Follows the code of models/ and context/. No torch.

Bytes of one micro-batch. Legend: T tokens of this rank, E width, F feed-forward width, V vocabulary, H and G query and
key/value heads, D head dim; F, V, H and G those of one tensor-parallel rank.
"""

from __future__ import annotations

from dataclasses import dataclass

from megazebra.config.schema import Config
from megazebra.context.choice import layer_shape
from megazebra.context.dealing import deal_queries
from megazebra.context.heads import HeadSplit
from megazebra.context.traffic import Shape
from megazebra.pattern import AttentionSpec

_WIDE = 4  # bytes of a float32: log-sum-exps, scales of norms


@dataclass(frozen=True)
class Sizes:
    """whole: T E, as attention and MLP read it. residual: the same of the residual stream, which sequence parallelism
    splits (Korthikanti et al. 2022). ffn: T F.
    """

    shape: Shape
    tokens: int
    whole: int
    residual: int
    ffn: int

    @classmethod
    def of(cls, config: Config) -> Sizes:
        model, parallel, shape = config.model, config.parallel, layer_shape(config)
        tokens = shape.batch * shape.local_len
        whole = tokens * model.hidden_size * shape.element_bytes
        shards = parallel.tensor if parallel.sequence_parallel else 1
        ffn = tokens * model.ffn_hidden_size // parallel.tensor * shape.element_bytes
        return cls(shape, tokens, whole, whole // shards, ffn)

    def heads(self, count: int) -> int:
        """T D of so many heads."""
        return self.tokens * count * self.shape.head_dim * self.shape.element_bytes


def block(config: Config, spec: AttentionSpec, sizes: Sizes) -> int:
    """Kept by a block that isn't recomputed as a whole.

    Inputs of both norms, and of the column-parallel layers: whole, or with sequence parallelism as shards that backward
    gathers again; recomputed blocks keep them whole for the moment of their backward. Gate, up and, unless it is
    recomputed, their product.
    """
    full = config.train.recompute == "full"
    column_input = sizes.whole if full else sizes.residual
    norms = 2 * (sizes.residual + sizes.residual // sizes.shape.element_bytes // config.model.hidden_size * _WIDE)
    products = 2 if config.train.recompute == "selective" else 3
    return norms + 2 * column_input + attention(config, spec, sizes) + products * sizes.ffn


def attention(config: Config, spec: AttentionSpec, sizes: Sizes) -> int:
    """Queries, keys, values, output and log-sum-exps; with QK norms also what these read."""
    shape = sizes.shape
    queries, keys = sizes.heads(shape.heads), 2 * sizes.heads(shape.kv_heads)
    sums = sizes.tokens * shape.heads * _WIDE
    before_norm = queries + keys // 2 if config.model.qk_norm else 0
    if shape.ranks == 1:
        return before_norm + 2 * queries + keys + sums
    # Besides the kernel's own output, the output projection keeps the one put together or sent back.
    return before_norm + 3 * queries + sums + _keys_read(spec, shape)


def _keys_read(spec: AttentionSpec, shape: Shape) -> int:
    """Keys and values that the kernel reads, of a rank in the middle."""
    one_key = 2 * shape.batch * shape.head_dim * shape.element_bytes
    n, rank = shape.local_len, shape.ranks // 2
    if spec.context == "halo":
        assert spec.window is not None
        reach = spec.window - 1
        # Its own, and once more those that the first queries read together with the halo.
        return one_key * shape.kv_heads * (n + min(reach, n) + min(reach, rank * n))
    if spec.context == "ulysses":
        split = HeadSplit.of(shape.heads, shape.kv_heads, shape.ranks)
        return one_key * len(split.slots(rank)) * shape.seq_len
    return one_key * shape.kv_heads * shape.seq_len


def receipts(spec: AttentionSpec, sizes: Sizes) -> int:
    """Kept by a fully recomputed layer from forward to backward, so that nothing is sent again."""
    shape = sizes.shape
    if shape.ranks == 1:
        return 0
    one_key = 2 * shape.batch * shape.head_dim * shape.element_bytes
    n, rank = shape.local_len, shape.ranks // 2
    queries = sizes.heads(shape.heads)
    if spec.context == "halo":
        assert spec.window is not None
        return one_key * shape.kv_heads * min(spec.window - 1, rank * n)
    if spec.context == "ulysses":
        split = HeadSplit.of(shape.heads, shape.kv_heads, shape.ranks)
        return 2 * queries + one_key * len(split.kv_heads(rank)) * shape.seq_len
    moved = deal_queries(None, shape.seq_len, shape.ranks, spec.window).rows_in(rank) > 0
    return one_key * shape.kv_heads * shape.seq_len + (2 * queries if moved else 0)


def kept(config: Config, specs: tuple[AttentionSpec, ...], sizes: Sizes) -> int:
    """Kept by all layers together when backward begins: all of a block, or its input and receipts."""
    if config.train.recompute == "full":
        blocks = sum(sizes.residual + receipts(spec, sizes) for spec in specs)
    else:
        blocks = sum(block(config, spec, sizes) for spec in specs)
    ropes = {spec.rope for spec in specs if spec.rope.enabled}
    angles = len(ropes) * sizes.tokens * config.model.head_size * _WIDE  # cos and sin of half a head each
    return blocks + angles + 2 * sizes.residual  # the last norm's input, and the hidden states' gradient
