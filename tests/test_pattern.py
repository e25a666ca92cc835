"""The pattern: one symbol, one AttentionSpec per layer."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megazebra.config import ModelConfig, RopeConfig
from megazebra.pattern import AttentionSpec, Pattern, expand_pattern, pattern_symbols

LOCAL = AttentionSpec(window=8, rope=RopeConfig(theta=1.0), sinks=True, softcap=2.0)
GLOBAL = AttentionSpec(window=None, rope=RopeConfig(theta=2.0))


@pytest.mark.parametrize(
    ("pattern", "layers", "symbols"),
    [
        ("G", 3, "GGG"),
        ("GLLL", 4, "GLLL"),
        ("GLLL", 8, "GLLLGLLL"),
        ("LLLLLG", 8, "LLLLLGLL"),  # the last group may be cut short
        (["G", "L"], 2, "GL"),
        (("L", "G"), 2, "LG"),
    ],
)
def test_symbols(pattern: Pattern, layers: int, symbols: str) -> None:
    assert "".join(str(symbol) for symbol in pattern_symbols(pattern, layers)) == symbols


@pytest.mark.parametrize(
    ("pattern", "layers", "words"),
    [
        ("", 4, "is empty"),
        ([], 4, "is empty"),
        ("GLX", 4, "has 'X' at position 2"),
        ("G 1", 4, "has ' ' at position 1"),
        ("gl", 4, "has 'g' at position 0"),
        ("G8", 4, "has '8' at position 1"),  # a window of its own needs a list
        (["G", "GL"], 2, "has 'GL' at position 1"),
        (["G", True], 2, "has True at position 1"),
        (["G", 0], 2, "has window 0 at position 1; a window counts the query itself, so >= 1"),
        (["G", -3], 2, "has window -3 at position 1"),
        ("GLLL", 3, r"has 4 symbols but the model has num_layers=3; shorten the pattern or set num_layers >= 4"),
        (["G", "L"], 4, "lists 2 layers but the model has num_layers=4"),
        (["G", "L"], 1, "lists 2 layers but the model has num_layers=1"),
    ],
)
def test_refused(pattern: Pattern, layers: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        pattern_symbols(pattern, layers)


def test_specs() -> None:
    specs = expand_pattern(["G", "L", 3], 3, LOCAL, GLOBAL)
    assert specs[0] is GLOBAL
    assert specs[1] is LOCAL
    assert specs[2] == AttentionSpec(window=3, rope=LOCAL.rope, sinks=True, softcap=2.0)
    assert [spec.kind for spec in specs] == ["global", "local", "local"]
    assert [spec.is_local for spec in specs] == [False, True, True]


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.text("GL", min_size=1, max_size=9), st.integers(1, 40))
def test_a_string_is_tiled(pattern: str, layers: int) -> None:
    if len(pattern) > layers:
        with pytest.raises(ValueError, match="symbols"):
            pattern_symbols(pattern, layers)
    else:
        assert pattern_symbols(pattern, layers) == tuple((pattern * layers)[:layers])


@pytest.mark.parametrize(
    ("sinks", "on_global", "on_local"), [("none", False, False), ("all", True, True), ("local", False, True)]
)
def test_model_config_gives_the_specs(sinks: str, on_global: bool, on_local: bool) -> None:
    model = ModelConfig.model_validate(
        {
            "num_layers": 3,
            "pattern": ["G", "L", 5],
            "window": 4,
            "rope_local": {"theta": 7.0},
            "attention_sinks": sinks,
            "attention_softcap": 30.0,
        }
    )
    specs = model.attention_specs()
    assert [spec.window for spec in specs] == [None, 4, 5]
    assert [spec.rope.theta for spec in specs] == [10000.0, 7.0, 7.0]
    assert [spec.sinks for spec in specs] == [on_global, on_local, on_local]
    assert {spec.softcap for spec in specs} == {30.0}


def test_sizes_that_follow() -> None:
    model = ModelConfig(hidden_size=64, num_attention_heads=4)
    assert (model.kv_heads, model.head_size) == (4, 16)
    model = ModelConfig(hidden_size=64, num_attention_heads=4, num_kv_heads=2, head_dim=32)
    assert (model.kv_heads, model.head_size) == (2, 32)
