"""Logits through a cache are those of the whole forward pass, whatever the chunks, windows, options and padding."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
import torch
from models.zebras import make_model, random_tokens, small_config
from support.allocations import Allocations
from torch import Tensor

from megazebra.attention.backend import load_backend
from megazebra.config import ParallelConfig, RopeConfig
from megazebra.generate import decode_attention
from megazebra.generate.cache import KVCache
from megazebra.generate.decode_attention import attend_to_cache
from megazebra.models.zebra import ZebraModel
from megazebra.parallel.mesh import Group, ParallelMesh
from megazebra.pattern import AttentionSpec

WINDOW = 5
LENGTH = 3 * WINDOW + 3  # from less than a window to beyond a third one
CHUNKS = (1, 3, WINDOW - 1, WINDOW, WINDOW + 1, LENGTH)
PATTERNS: dict[str, dict[str, Any]] = {
    "GLLL": {},
    "LLLL": {"pattern": "L"},
    "windows of their own": {"pattern": ["G", 3, "L", 9]},
}
OPTIONS: dict[str, dict[str, Any]] = {
    "one kv head": {"num_kv_heads": 1},
    "all kv heads": {"num_kv_heads": None},
    "sinks": {"attention_sinks": "all"},
    "local sinks": {"attention_sinks": "local", "attention_bias": True},
    "softcaps": {"attention_softcap": 2.0, "final_logit_softcap": 3.0},
    "nope": {"rope_global": {"enabled": False}},
    "qk-norm": {"qk_norm": True, "head_dim": 16},
    "two ropes": {
        "rope_global": {"scaling": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        "rope_local": {"theta": 500.0},
    },
    "a window of one": {"window": 1},
    "a window longer than everything": {"window": 64},
}
# float64 (unit roundoff 1.1e-16), some thousand operations deep, in another order: relative to the largest.
RELATIVE = 1e-12
# float32 in another order, as tests/models/test_transformers_parity.py derives it.
FLOAT32 = {"rtol": 0.0, "atol": 5e-5}


def sizes_of(chunk: int, length: int) -> list[int]:
    return [min(chunk, length - start) for start in range(0, length, chunk)]


@torch.no_grad()
def cached(model: ZebraModel, tokens_BS: Tensor, sizes: Iterable[int], padding: list[int] | None = None) -> Tensor:
    """Logits [B, S, V] of forward passes over so many tokens each."""
    cache = KVCache.of(model, padding or [0] * len(tokens_BS), capacity=tokens_BS.shape[1])
    return torch.cat([model(part, cache=cache) for part in tokens_BS.split(list(sizes), dim=1)], dim=1)


def assert_same(logits: Tensor, expected: Tensor) -> None:
    assert (logits - expected).abs().max() <= RELATIVE * expected.abs().max()


@pytest.mark.parametrize("pattern", PATTERNS)
def test_any_chunks_of_any_pattern(pattern: str) -> None:
    model = make_model(small_config(window=WINDOW, **PATTERNS[pattern]), dtype=torch.float64)
    tokens, _ = random_tokens(model.model.config, 2, LENGTH)
    with torch.no_grad():
        expected = model(tokens)
    for chunk in CHUNKS:
        assert_same(cached(model, tokens, sizes_of(chunk, LENGTH)), expected)


@pytest.mark.parametrize("option", OPTIONS)
def test_any_option(option: str) -> None:
    model = make_model(small_config(**{"window": WINDOW} | OPTIONS[option]), dtype=torch.float64)
    tokens, _ = random_tokens(model.model.config, 2, LENGTH)
    with torch.no_grad():
        expected = model(tokens)
    # Alone and together, before and after the ring has gone round, and a chunk that goes round twice.
    for sizes in ([2, 3, 1, 6, 1, 1, 4], [1, 1, 12, 4], [7, *[1] * 11]):
        assert_same(cached(model, tokens, sizes), expected)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_rows_of_different_lengths(pattern: str) -> None:
    """Every row is as if it were alone; chunks begin and end inside padding, rings go round with padding in them."""
    config = small_config(window=WINDOW, attention_sinks="all", **PATTERNS[pattern])
    model = make_model(config, dtype=torch.float64)
    padding = [0, WINDOW - 1, WINDOW + 3, LENGTH - 2]
    tokens, _ = random_tokens(config, len(padding), LENGTH)
    for chunk in CHUNKS:
        logits = cached(model, tokens, sizes_of(chunk, LENGTH), padding)
        assert logits.isfinite().all()
        for row, first in enumerate(padding):
            with torch.no_grad():
                alone = model(tokens[row : row + 1, first:])
            assert_same(logits[row : row + 1, first:], alone)


def test_no_bit_depends_on_padding() -> None:
    config = small_config(window=WINDOW)
    model = make_model(config)
    padding = [0, 3, WINDOW + 4]
    tokens, _ = random_tokens(config, len(padding), LENGTH)
    others = tokens.clone()
    for row, count in enumerate(padding):
        others[row, :count] = (tokens[row, :count] + 1) % config.vocab_size
    for sizes in (sizes_of(1, LENGTH), [8, *[1] * 10]):
        one, other = (cached(model, which, sizes, padding) for which in (tokens, others))
        for row, count in enumerate(padding):
            assert torch.equal(one[row, count:], other[row, count:])


@pytest.mark.parametrize("backend", ["blocked", "reference", "simd"])
def test_float32_through_the_backends_of_training(backend: str) -> None:
    config = small_config(head_dim=32, window=12)
    if why := load_backend(backend).unavailable(torch.device("cpu")):
        pytest.skip(why)
    model = make_model(config, backend=backend)
    tokens, _ = random_tokens(config, 2, 40)
    with torch.no_grad():
        expected = model(tokens)
    torch.testing.assert_close(cached(model, tokens, [9, 20, *[1] * 11]), expected, **FLOAT32)


@pytest.mark.parametrize("changes", [{}, {"attention_sinks": "all", "attention_softcap": 4.0}])
def test_bf16_is_as_close_to_the_truth_as_without_a_cache(changes: dict[str, Any]) -> None:
    config = small_config(head_dim=32, window=12, **changes)
    tokens, _ = random_tokens(config, 2, 48)
    model = make_model(config, backend="reference", dtype=torch.bfloat16)
    with torch.no_grad():
        exact = make_model(config, backend="reference", dtype=torch.float64)
        # The same rounded weights.
        exact.load_state_dict(model.state_dict())
        truth, whole = exact(tokens), model(tokens)
    part = cached(model, tokens, [10, 20, *[1] * 18])
    assert part.dtype == torch.bfloat16
    without, with_cache = ((logits.double() - truth).pow(2).mean().sqrt() for logits in (whole, part))
    # Both round every activation to 8 bits, and sums alike; errors of thousands of logits differ by chance only.
    assert with_cache < 1.25 * without


@pytest.mark.parametrize("capacity", [1, WINDOW - 1, WINDOW, 64, 1000])
@pytest.mark.parametrize("layers", [4, 8])
def test_memory_follows_the_formula(capacity: int, layers: int) -> None:
    model = make_model(small_config(num_layers=layers, window=WINDOW))
    cache = KVCache.of(model, [0, 0, 0], capacity)
    # The tensors themselves: what they say of their size is not asked.
    storages = [
        value.untyped_storage() for layer in cache.layers for value in vars(layer).values() if isinstance(value, Tensor)
    ]
    assert sum(storage.nbytes() for storage in storages) == cache.nbytes
    full = 3 * capacity * layers * 2 * 2 * 8 * 4  # rows, columns, layers, keys and values, heads, head dim, float32
    assert cache.full_attention_nbytes == full
    group = 4
    share = Fraction(1, group) + (1 - Fraction(1, group)) * Fraction(min(capacity, WINDOW), capacity)
    assert Fraction(cache.nbytes, full) == share


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_copies_no_cache(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing a decoding step allocates is as large as one layer's keys, in global layers or in local ones."""
    config = small_config(window=200, head_dim=64)
    model = make_model(config, dtype=dtype)
    monkeypatch.setitem(decode_attention._BLOCK_ELEMENTS, "cpu", 2 * 2 * 64 * 20)  # float32 copies are of 20 keys
    cache = KVCache.of(model, [0, 150], capacity=300)
    tokens, _ = random_tokens(config, 2, 290)
    with torch.no_grad():
        model(tokens[:, :280], cache=cache)
        with Allocations() as allocated:
            model(tokens[:, 280:281], cache=cache, last_only=True)
    smallest = min(layer.keys_BGTD.nbytes for layer in cache.layers)
    assert 0 < max(allocated.bytes) < smallest // 4


def test_what_does_not_fit_is_refused() -> None:
    model = make_model(small_config())
    tokens, _ = random_tokens(model.model.config, 1, 7)
    cache = KVCache.of(model, [0], capacity=10)
    with torch.no_grad():
        model(tokens, cache=cache)
        with pytest.raises(ValueError, match="the cache holds 7 of 10 tokens, 7 more do not fit"):
            model(tokens, cache=cache)
    for mesh, runtime in (
        (replace(model.mesh, cp=Group("cp", (0, 1), 0)), model.runtime),
        (model.mesh, replace(model.runtime, sequence_parallel=True)),
    ):
        other = make_model(small_config())
        other.mesh, other.runtime = mesh, runtime
        with pytest.raises(ValueError, match=r"load it with parallel\.tensor alone"):
            KVCache.of(other, [0], capacity=10)


def test_longrope_takes_the_factors_of_the_whole_length() -> None:
    rope = {
        "scaling": "longrope", "factor": 2.0, "original_max_position_embeddings": 16,
        "short_factor": (1, 1, 1.5, 2), "long_factor": (1, 2, 3, 4),
    }  # fmt: skip
    model = make_model(small_config(rope_global=rope), dtype=torch.float64)
    tokens, _ = random_tokens(model.model.config, 1, 20)
    for length in (12, 20):
        # The prompt, shorter than the original length, is read as the whole will be.
        with torch.no_grad():
            expected = model(tokens[:, :length], seq_len=length)
        assert_same(cached(model, tokens[:, :length], [10, *[1] * (length - 10)]), expected)


@pytest.mark.parametrize("options", [{}, {"sinks": True}, {"softcap": 1.5}, {"sinks": True, "softcap": 1.5}])
@pytest.mark.parametrize("block", [1, 7, 1000])
def test_one_query_against_the_oracle(options: dict[str, Any], block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys in any order, in blocks of any size; what is unseen changes nothing."""
    B, T, H, G, D = 3, 20, 6, 2, 8
    monkeypatch.setitem(decode_attention._BLOCK_ELEMENTS, "cpu", B * G * D * block)
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(B, 1, H, D, generator=generator, dtype=torch.float64)
    k, v = torch.randn(2, B, T, G, D, generator=generator, dtype=torch.float64)
    sinks = torch.randn(H, generator=generator, dtype=torch.float64) if options.get("sinks") else None
    spec = AttentionSpec(window=None, rope=RopeConfig(), **options)
    order = torch.randperm(T, generator=generator)
    unseen = torch.zeros(B, T, dtype=torch.bool)
    unseen[1, :4] = unseen[2, : T - 1] = True
    out = attend_to_cache(
        q,
        k[:, order].transpose(1, 2).contiguous(),
        v[:, order].transpose(1, 2).contiguous(),
        spec=spec,
        sinks_H=sinks,
        unseen_BT=unseen[:, order],
    )
    for row in range(B):
        seen = ~unseen[row]
        expected = load_backend("reference").attend(
            q[row : row + 1], k[row : row + 1, seen], v[row : row + 1, seen], spec=spec, sinks_H=sinks
        )
        torch.testing.assert_close(out[row : row + 1], expected, rtol=0, atol=1e-14)


def test_heads_of_a_tensor_parallel_rank() -> None:
    mesh = ParallelMesh.build(ParallelConfig())
    model = make_model(small_config())
    model.mesh = replace(mesh, tp=Group("tp", (0, 1), 0))
    assert [layer.keys_BGTD.shape[1] for layer in KVCache.of(model, [0], 4).layers] == [1, 1, 1, 1]
