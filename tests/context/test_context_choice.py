"""Which strategy a layer gets, and what a user is told of it."""

from __future__ import annotations

import pytest

from megazebra.config.schema import Config
from megazebra.context.choice import layer_shape, resolve_specs, sequence_multiple, strategy_table
from megazebra.context.traffic import Received, Shape, busiest, received

LLAMA_7B = {"num_layers": 4, "max_position_embeddings": 1 << 20}


def config(model: dict[str, object] | None = None, seq_len: int = 32768, **parallel: object) -> Config:
    return Config.model_validate(
        {"model": {**LLAMA_7B, **(model or {})}, "data": {"seq_len": seq_len}, "parallel": parallel}
    )


def strategies(config: Config) -> list[str]:
    return [spec.context for spec in resolve_specs(config)]


def test_auto_takes_what_receives_least() -> None:
    assert strategies(config(context=8)) == ["ulysses", "halo", "halo", "halo"]
    assert strategies(config(context=1)) == ["single"] * 4
    # 32 / 4 heads of a tensor-parallel rank do not divide by 16 or 3.
    assert strategies(config(context=16, tensor=4)) == ["allgather", "halo", "halo", "halo"]
    # A window of half the sequence: a rank would fetch four shards of keys.
    assert strategies(config({"window": 16384}, context=8)) == ["ulysses"] * 4


def test_what_is_asked_for_is_taken_or_refused() -> None:
    assert strategies(config(context=8, context_local="allgather", context_global="allgather")) == ["allgather"] * 4
    with pytest.raises(ValueError, match=r"parallel.context_global=ulysses can't serve here: parallel.context=5 does"):
        strategies(config(context=5, context_global="ulysses"))


def test_llama_7b_at_32k_over_eight_ranks() -> None:
    """2 G D (w - 1), (2 H + 2 G) D (S / P) (P - 1) / P and 2 G D S (P - 1) / P, in bf16: forward bytes."""
    shape = layer_shape(config(context=8))
    assert shape == Shape(1, 32768, 32, 32, 128, 8, 2)
    global_, local = config().model.attention_specs()[:2]
    assert received("halo", local, shape, 4) == Received(2 * 32 * 128 * 511 * 2, 2 * 32 * 128 * 511 * 2)
    assert received("ulysses", global_, shape, 4).forward == 4 * 32 * 128 * 4096 * 7 // 8 * 2
    keys = 2 * 32 * 128 * 32768 * 7 // 8 * 2
    assert received("allgather", local, shape, 4) == Received(keys, 2 * keys)  # gradients in float32
    # Half of the queries come, half of the outputs go.
    assert received("allgather", global_, shape, 4).forward == keys + 2 * 2048 * 32 * 128 * 2
    ours = busiest("ulysses", global_, shape).total + 3 * busiest("halo", local, shape).total
    theirs = busiest("allgather", global_, shape).total + 3 * busiest("allgather", local, shape).total
    assert ours <= 0.1 * theirs


def test_key_heads_are_replicated_where_they_are_fewer_than_ranks() -> None:
    shape = Shape(1, 32768, 32, 4, 128, 8, 2)
    global_ = config().model.attention_specs()[0]
    assert received("ulysses", global_, shape, 0).forward == (2 * 32 + 2 * 8) * 128 * 4096 * 7 // 8 * 2


def test_sequences_are_padded_to_equal_shards() -> None:
    assert sequence_multiple(config(context=4, tensor=2)) == 4
    assert sequence_multiple(config(context=4, tensor=2, sequence_parallel=True)) == 8
    assert layer_shape(config(seq_len=1000, context=3)).seq_len == 1002


def test_the_table_names_every_kind_of_layer() -> None:
    asked = config({"pattern": ("G", "L", 128, "L")}, context=8)
    first, *lines = strategy_table(asked, resolve_specs(asked))
    assert "8 ranks of 4,096 tokens" in first
    assert [line.split(":")[0].strip() for line in lines] == [
        "1 global layer",
        "2 local 512 layers",
        "1 local 128 layer",
    ]
    assert "ulysses 117.44 + 117.44 MB (not allgather" in lines[0]
    assert "halo 8.37 + 8.37 MB (not ulysses 117.44 + 117.44 MB; allgather 469.76 + 939.52 MB)" in lines[1]
    heads = config({"pattern": "G"}, context=3)
    lines = list(strategy_table(heads, resolve_specs(heads)))
    assert (
        "(not ulysses, as parallel.context=3 does not divide the 32 query heads of a tensor-parallel rank)" in lines[1]
    )
