"""Weights under which an output says which tokens were seen, exactly.

A query's output is the mean of the values it sees, weighted by the softmax. With values that are 0 but for one marked
token's, it is that token's weight: exactly 0 where the query doesn't see it, whatever order a kernel sums in, since it
sums zeros. So there is no threshold between rounding and influence. Where the query does see it, the weight has to be
far from 0: queries are drawn small, so that logits have a standard deviation of 0.1 to 0.2 and every weight is near
1 / (keys seen). Multiplied by the number of keys that a query may see, outputs are near 1 or larger, layer after layer.

Channels of the residual stream: number h < H is where head h writes its output, and where key/value head h reads its
values; queries and keys read the others only. So marks change no weight of attention, heads don't mix, and a head that
sees too much or too little shows by itself.

Legend: H query heads, G key/value heads, D head dim, E = 2 H channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megazebra.config.schema import Config
from megazebra.models.layers import Attention
from megazebra.parallel.mesh import Group
from megazebra.parallel.sharding import full_shape, shard_of

QUERY_SIZE = 0.1
SEED = 6


def narrowed(config: Config) -> Config:
    """The same attention - heads, windows, layout, kernels - in a model that is small everywhere else."""
    model, tensor = config.model, config.parallel.tensor
    changes = {
        "hidden_size": 2 * model.num_attention_heads,
        "head_dim": model.head_size,
        "ffn_hidden_size": tensor,
        "vocab_size": 64 * tensor,
        "tie_word_embeddings": False,
    }
    return config.model_copy(update={"model": model.model_copy(update=changes)})


@torch.no_grad()
def hear_marks(attention: Attention, heads: int, kv_heads: int, tp: Group, keys: int) -> None:
    """Fill the layer's weights, the same under every layout. keys: how many a query may see."""
    generator = torch.Generator().manual_seed(SEED)
    head_dim = attention.head_dim
    for projection, size in ((attention.q_proj, QUERY_SIZE), (attention.k_proj, 1.0)):
        full = torch.zeros(full_shape(projection.weight, projection.weight.shape))
        full[:, heads:].normal_(0, size * heads**-0.5, generator=generator)
        _fill(projection.weight, full, tp)
    if attention.q_norm is not None:
        attention.q_norm.weight.fill_(QUERY_SIZE)
    values = torch.eye(kv_heads, 2 * heads)
    _fill(attention.v_proj.weight, values.repeat_interleave(head_dim, dim=0), tp)
    outputs = torch.eye(2 * heads, heads) * (keys / head_dim)
    _fill(attention.o_proj.weight, outputs.repeat_interleave(head_dim, dim=1), tp)


def _fill(weight: torch.nn.Parameter, full: Tensor, tp: Group) -> None:
    weight.copy_(shard_of(full.to(weight.device), weight, weight.shape, tp))
