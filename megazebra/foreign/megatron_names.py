"""Shards under the names of Megatron-LM, Megatron-DeepSpeed and Megatron-core, which fuse what Llama has apart.

Both generations hold the same tensors (a rank's part; n query heads per group, D elements a head):

    embedding.word_embeddings.weight   rows of the vocabulary, padded to a multiple of the ranks (and of 128)
    self_attention.linear_qkv          for each of the rank's groups: n x D rows of queries, D of keys, D of values
    self_attention.linear_proj         columns of the output projection
    mlp.linear_fc1                     the rank's rows of the gate, then its rows of "up"
    mlp.linear_fc2                     columns of "down"
    output_layer.weight                as the embedding

Rotary embeddings turn the first half of a head with the second, as Hugging Face's Llama does: no row moves.
Said by Megatron-LM's transformer/attention.py, transformer/mlp.py and models/common/embeddings/rope_utils.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from math import prod

from megazebra.checkpoint.store import CheckpointError
from megazebra.config.schema import ModelConfig
from megazebra.foreign.llama_names import EMBEDDING, OUTPUT, vocabulary_fits
from megazebra.foreign.shards import Part, Shard, columns, rows, shortened
from megazebra.plan.parameters import Parameter, parameters

# From other spellings to one: wrappers, the generation before Megatron-core, norms that are fused with what follows.
_SPELLINGS = [
    (re.compile(pattern), name)
    for pattern, name in (
        (r"^(module\.)+", ""),
        (r"^language_model\.", ""),
        (r"^(encoder|transformer)\.", "decoder."),
        (r"\.query_key_value\.", ".linear_qkv."),
        (r"self_attention\.dense\.", "self_attention.linear_proj."),
        (r"\.dense_h_to_4h\.", ".linear_fc1."),
        (r"\.dense_4h_to_h\.", ".linear_fc2."),
        (r"self_attention\.linear_qkv\.layer_norm_", "input_layernorm."),
        (r"mlp\.linear_fc1\.layer_norm_", "pre_mlp_layernorm."),
        (r"\.input_norm\.", ".input_layernorm."),
        (r"\.post_attention_(layernorm|norm)\.", ".pre_mlp_layernorm."),
        (r"\.final_norm\.", ".final_layernorm."),
    )
]
# Follow from the configuration, or belong to kernels.
_NO_WEIGHTS = re.compile(r"(_extra_state|rotary_pos_emb\.inv_freq|rotary_emb\.inv_freq)$")
_IN_LAYER = {
    "input_layernorm": "input_layernorm",
    "post_attention_layernorm": "pre_mlp_layernorm",
    "self_attn.q_proj": "self_attention.linear_qkv",
    "self_attn.k_proj": "self_attention.linear_qkv",
    "self_attn.v_proj": "self_attention.linear_qkv",
    "self_attn.o_proj": "self_attention.linear_proj",
    "self_attn.q_norm": "self_attention.q_layernorm",
    "self_attn.k_norm": "self_attention.k_layernorm",
    "mlp.gate_proj": "mlp.linear_fc1",
    "mlp.up_proj": "mlp.linear_fc1",
    "mlp.down_proj": "mlp.linear_fc2",
}
_ELSEWHERE = {
    EMBEDDING: "embedding.word_embeddings.weight",
    OUTPUT: "output_layer.weight",
    "model.norm.weight": "decoder.final_layernorm.weight",
}
_LAYER_WEIGHT = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)")


def with_one_spelling(shards: Mapping[str, Shard]) -> dict[str, Shard]:
    """The shards of a rank under Megatron-core's names, without what are no weights."""
    found = {}
    for name, shard in shards.items():
        if not _NO_WEIGHTS.search(name):
            for pattern, replacement in _SPELLINGS:
                name = pattern.sub(replacement, name)
            found[name] = shard
    return found


def are_megatrons(shards: Mapping[str, Shard]) -> bool:
    return _ELSEWHERE[EMBEDDING] in with_one_spelling(shards)


def megatron_parts(model: ModelConfig, ranks: Sequence[Mapping[str, Shard]]) -> dict[str, list[Part]]:
    """Which elements of which weight every shard holds; names are those of `with_one_spelling`.

    Raises CheckpointError when the layout is not the one above.
    """
    for name, size in (("num_kv_heads", model.kv_heads), ("ffn_hidden_size", model.ffn_hidden_size)):
        if size % len(ranks):
            raise CheckpointError(
                f"{len(ranks)} tensor-parallel ranks do not divide model.{name}={size}; correct it, or save with fewer "
                "ranks: ranks that hold the same heads are not supported"
            )
    _check_shapes(model, ranks)
    return {
        parameter.name: [
            part
            for rank, shards in enumerate(ranks)
            for part in _parts(model, parameter, shards[_name_there(parameter.name)].shape, len(ranks), rank)
        ]
        for parameter in parameters(model, 1)
    }


def _check_shapes(model: ModelConfig, ranks: Sequence[Mapping[str, Shard]]) -> None:
    wanted: dict[str, tuple[int, ...]] = {}
    for part in parameters(model, len(ranks)):
        name = _name_there(part.name)
        fused_rows = wanted[name][0] if name in wanted else 0
        wanted[name] = (fused_rows + part.shape[0], *part.shape[1:])
    problems = []
    for rank, shards in enumerate(ranks):
        for name, shape in wanted.items():
            if name not in shards:
                problems.append(f"{name} is missing on tensor-parallel rank {rank}")
                continue
            found = shards[name].shape
            is_vocabulary = name in (_ELSEWHERE[EMBEDDING], _ELSEWHERE[OUTPUT])
            fits = vocabulary_fits(found, (model.vocab_size, model.hidden_size), len(ranks))
            if not (fits if is_vocabulary else found == shape):
                problems.append(
                    f"{name} has shape {list(found)} on tensor-parallel rank {rank} of {len(ranks)}, the configuration "
                    f"asks for {list(shape)}"
                )
    if problems:
        raise CheckpointError(f"the weights are not laid out as Megatron lays out this model: {shortened(problems)}")


def _parts(model: ModelConfig, whole: Parameter, shard_shape: tuple[int, ...], ranks: int, rank: int) -> Iterator[Part]:
    """What a rank holds of a weight."""
    theirs, shape = _name_there(whole.name), whole.shape
    width = prod(shape[1:])
    kind = whole.name.split(".")[-2]
    if kind in ("q_proj", "k_proj", "v_proj"):
        groups, queries, size = model.kv_heads // ranks, model.num_attention_heads // model.kv_heads, model.head_size
        first, heads = {"q_proj": (0, queries), "k_proj": (queries, 1), "v_proj": (queries + 1, 1)}[kind]
        for group in range(groups):
            span = rows(shape, (rank * groups + group) * heads * size, heads * size)
            yield Part(rank, theirs, (group * (queries + 2) + first) * size * width, span)
    elif kind in ("gate_proj", "up_proj"):
        features = model.ffn_hidden_size // ranks
        yield Part(rank, theirs, (kind == "up_proj") * features * width, rows(shape, rank * features, features))
    elif kind in ("o_proj", "down_proj") and len(shape) == 2:
        yield Part(rank, theirs, 0, columns(shape, ranks, rank))
    elif kind in ("embed_tokens", "lm_head"):
        yield Part(rank, theirs, 0, rows(shape, rank * shard_shape[0], shard_shape[0]))
    else:  # every rank holds the same: the first one's is taken
        yield Part(rank, theirs, 0, rows(shape, 0, shape[0] if rank == 0 else 0))


def _name_there(name: str) -> str:
    if name in _ELSEWHERE:
        return _ELSEWHERE[name]
    layer = _LAYER_WEIGHT.fullmatch(name)
    if layer is None or layer[2] not in _IN_LAYER:
        raise CheckpointError(f"Megatron has no place for {name}; correct the model's configuration")
    return f"decoder.layers.{layer[1]}.{_IN_LAYER[layer[2]]}.{layer[3]}"
