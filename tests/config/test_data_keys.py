"""Sources and held-out corpora by name: what a user writes, and what is said when it is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from megazebra.config import ConfigError, load_config, save_config
from megazebra.config.help import help_text

YAML = """\
data:
  sources:
    long: {path: books, weight: 0.6, min_document_tokens: 32768}
    rest: {path: books, weight: 0.4, max_document_tokens: 32767}
  validation_sources:
    books: held/books
"""


def test_sources_are_read_and_saved(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(YAML)
    config = load_config(tmp_path / "run.yaml")
    assert config.data.sources["long"].weight == 0.6
    assert config.data.sources["rest"].max_document_tokens == 32767
    assert config.data.validation_sources == {"books": "held/books"}
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config


def test_one_value_of_a_source_is_overridden(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(YAML)
    overrides = [
        "data.sources.long.weight=0.9",
        "data.sources.more={path: x, weight: 1}",
        "data.validation_sources.m=y",
    ]
    data = load_config(tmp_path / "run.yaml", overrides).data
    assert (data.sources["long"].weight, data.sources["long"].min_document_tokens) == (0.9, 32768)
    assert data.sources["more"].path == "x"
    assert data.validation_sources == {"books": "held/books", "m": "y"}


def test_help_documents_the_keys_of_a_source() -> None:
    text = help_text(100)
    assert "min_document_tokens  (a whole number >= 0)" in text
    assert "Take only documents of at least this many tokens." in text


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["data.sources={a: {path: x, weigth: 2}}"],
            "unknown key 'data.sources.a.weigth'; did you mean 'weight'?",
        ),
        (["data.sources={a: {path: x, weight: 0}}"], r"data.sources.a.weight=0: must be a number > 0 or null"),
        (["data.sources={a: {weight: 1}}"], "data.sources.a.path is missing: Prefix of the source's corpus."),
        (["data.sources={a: x}"], "data.sources.a=x: must be a mapping of path, weight"),
        (["data.sources=[x]"], "must be {NAME: {path: ..., weight: ..."),
        (["data.validation_sources={a: 3}"], "must be {NAME: text, ...}"),
        (
            ["data.sources={a: {path: x, weight: 1}, b: {path: y}}"],
            "gives some weights but none for b; give every source one, or none",
        ),
        (["data.sources={a/b: {path: x}}"], "has the name 'a/b'; take letters, digits"),
        (["data.sources.a.weight=2"], "data.sources.a.path is missing"),
        (["data.sources.a.b.c=2"], "unknown key 'data.sources.a.b'"),
        (["data.sources=3", "data.sources.a.path=x"], "must be {NAME: {path: ..., weight: ..."),
        (["data.megatron_split=[969, 30, 1]"], "is not read with index_compat=none"),
        (["data.index_compat=megatron", "data.megatron_split=[0, 1]"], "leaves nothing to train on"),
        (["data.path=x", "data.sources={a: {path: x}}"], "and data.path are both given"),
        (["data.validation_path=x", "data.validation_sources={a: x}"], "and data.validation_path are both given"),
        (
            ["data.sources={a: {path: x, min_document_tokens: 9, max_document_tokens: 8}}"],
            "asks 'a' for documents of at least 9 and at most 8 tokens; swap the two",
        ),
        (
            ["data.index_compat=megatron", "data.sources={a: {path: x, min_document_tokens: 9}}"],
            "one whole corpus; give one source without a filter",
        ),
        (
            ["data.index_compat=megatron", "data.path=x", "data.packing=best_fit"],
            "must be concatenate with data.index_compat=megatron",
        ),
        (["data.packing=best_fit", "data.document_mask=false"], "must be true with data.packing=best_fit"),
    ],
)
def test_mistakes_are_named(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, overrides)
    assert message in str(caught.value)


def test_every_wrong_entry_is_reported() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, ["data.sources={a: {path: 1}, b: {weight: -1}, c: []}"])
    for part in ("sources.a.path=1", "sources.b.path is missing", "sources.b.weight=-1", "sources.c=[]"):
        assert part in str(caught.value)
