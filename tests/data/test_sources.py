"""Mixtures of corpora as a run sees them: shares, filters, packing, conversations, and what a resume has to find."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megazebra.config.schema import Config
from megazebra.data.corpus.corpus_writer import CorpusWriter
from megazebra.data.corpus.indexed_corpus import Corpus
from megazebra.data.errors import CorpusError
from megazebra.data.sources import TrainingData, open_training_data, open_validation_data
from megazebra.labels import IGNORE_INDEX

EOD, SEQ_LEN, VOCAB = 0, 32, 50


def write(prefix: Path, lengths: list[int], first: int) -> None:
    """Documents of the token `first`, `first + 1`, ... in turn (so that a token names its corpus), then EOD."""
    with CorpusWriter(prefix, vocab_size=VOCAB, eod_id=EOD) as writer:
        writer.add_documents([[first + n % 10] * (length - 1) + [EOD] for n, length in enumerate(lengths)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three corpora: `a` of tokens 10-19, `b` of tokens 20-29 (some documents long), and conversations `talk`."""
    folder = tmp_path_factory.mktemp("corpora")
    random = np.random.default_rng(0)
    write(folder / "a", random.integers(2, 40, 300).tolist(), 10)
    write(folder / "b", [*random.integers(2, 30, 200).tolist(), *random.integers(100, 200, 20).tolist()], 20)
    with CorpusWriter(folder / "talk", vocab_size=VOCAB, eod_id=EOD, with_spans=True) as writer:
        for n in range(100):
            question, answer = 3 + n % 5, 2 + n % 7
            spans = np.array([[question, question + answer]])
            writer.add_document([30] * question + [40] * answer + [31], spans=spans)
    return folder


def training(folder: Path, **data: Any) -> TrainingData:
    if "sources" in data:
        named = data["sources"].items()
        data["sources"] = {name: {**source, "path": str(folder / source["path"])} for name, source in named}
    if "path" in data:
        data["path"] = str(folder / data["path"])
    config = {
        "model": {"vocab_size": VOCAB},
        "data": {"seq_len": SEQ_LEN, **data},
        "train": {"steps": 10, "global_batch_size": 8},
    }
    return open_training_data(Config.model_validate(config))


def drawn(data: TrainingData, count: int) -> Counter[int]:
    """Samples of each corpus (by the tens of its tokens) among the first `count`."""
    return Counter(int(np.max(data[i].tokens) // 10) for i in range(count))


def test_shares_are_kept_at_every_point(folder: Path) -> None:
    data = training(folder, sources={"a": {"path": "a", "weight": 3}, "b": {"path": "b", "weight": 1}})
    assert data.shares == [0.75, 0.25]
    for count in (4, 10, 101, 200):
        assert abs(drawn(data, count)[1] - 0.75 * count) <= 1
    assert [data[i].index for i in range(5)] == list(range(5))


def test_without_weights_the_tokens_decide(folder: Path) -> None:
    data = training(folder, sources={"a": {"path": "a"}, "b": {"path": "b"}})
    tokens = [Corpus(folder / name).tokens for name in "ab"]
    assert data.shares == pytest.approx([n / sum(tokens) for n in tokens])


def test_epochs_count_each_source_on_its_own(folder: Path) -> None:
    data = training(folder, sources={"a": {"path": "a", "weight": 1}, "b": {"path": "b", "weight": 1}})
    epochs = data.epochs(400)
    for source in data.sources:
        assert epochs[source.name] == 200 / source.samples.samples_per_epoch
    assert epochs["a"] != epochs["b"]


def test_long_documents_at_a_share_of_their_own(folder: Path) -> None:
    """A corpus twice: its long documents at 60 %, all of it at 40 %."""
    data = training(
        folder,
        sources={
            "long": {"path": "b", "weight": 0.6, "min_document_tokens": 100},
            "all": {"path": "b", "weight": 0.4},
        },
    )
    everything, long = data.sources  # in the order of their names
    assert (long.documents, everything.documents) == (20, 220)
    lengths = Corpus(folder / "b").document_lengths
    found = set(long.samples.documents.tolist())
    assert found == set(np.flatnonzero(lengths >= 100).tolist())
    # What is laid into samples are those documents' tokens, and no others'.
    epoch = [long.samples[i] for i in range(long.samples.samples_per_epoch)]
    expected = Counter(t for d in found for t in Corpus(folder / "b").read(d).tolist())
    seen = Counter(t for sample in epoch for t in sample.tokens.tolist())
    assert sum((expected - seen).values()) <= SEQ_LEN
    assert not seen - expected


def test_a_filter_that_leaves_nothing_is_named(folder: Path) -> None:
    with pytest.raises(CorpusError, match=r"data\.sources\.b: no document .* has 1000 to any number of tokens"):
        training(folder, sources={"b": {"path": "b", "min_document_tokens": 1000}})
    with pytest.raises(CorpusError, match=r"data\.sources\.b\.path="):
        training(folder, sources={"b": {"path": "missing"}})
    with pytest.raises(CorpusError, match=r"data\.path is not set"):
        training(folder)


def test_best_fit_packing_loses_no_token(folder: Path) -> None:
    data = training(folder, path="b", packing="best_fit")
    source = data.sources[0]
    corpus = source.corpus
    inputs: Counter[int] = Counter()
    learned: Counter[int] = Counter()
    for i in range(source.samples.samples_per_epoch):
        sample = source.samples[i]
        assert sum(sample.document_lengths) == SEQ_LEN == len(sample.tokens) == len(sample.labels)
        assert sample.document_lengths == source.samples.document_lengths(i)
        counted = sample.labels != IGNORE_INDEX
        learned.update(sample.labels[counted].tolist())
        inputs.update(sample.tokens.tolist())
    every: Counter[int] = Counter(t for d in range(corpus.documents) for t in corpus.read(d).tolist())
    firsts: Counter[int] = Counter(int(corpus.read(d, 0, 1)[0]) for d in range(corpus.documents))
    padding = source.samples.samples_per_epoch * SEQ_LEN - corpus.tokens
    assert inputs == every + Counter({EOD: padding})
    assert learned == every - firsts  # each token is a label once, but for those that begin a document


def test_conversations_are_whole_and_only_the_assistant_is_learned(folder: Path) -> None:
    samples = training(folder, path="talk").sources[0].samples
    conversations = 0
    for i in range(samples.samples_per_epoch):
        sample = samples[i]
        assert [t for t, label in zip(sample.tokens, sample.labels, strict=True) if t == 40 and label == 30] == []
        position = 0
        for length in sample.document_lengths:
            tokens, labels = (row[position : position + length] for row in (sample.tokens, sample.labels))
            position += length
            if tokens[0] != 30:  # padding
                assert (labels == IGNORE_INDEX).all()
                continue
            conversations += 1
            assert tokens[-1] == 31
            # The first of the assistant's tokens is learned from the question's last, and nothing else is.
            answer = np.flatnonzero(tokens == 40)
            assert np.flatnonzero(labels != IGNORE_INDEX).tolist() == (answer - 1).tolist()
            assert (labels[answer - 1] == 40).all()
    assert conversations == 100


def test_loss_on_all_learns_the_questions_too(folder: Path) -> None:
    samples = training(folder, path="talk", loss_on="all").sources[0].samples
    counted = sum(int((samples[i].labels != IGNORE_INDEX).sum()) for i in range(samples.samples_per_epoch))
    assert counted == Corpus(folder / "talk").tokens - 100


@pytest.mark.parametrize("policy", ["drop", "truncate"])
def test_overlong_conversations(folder: Path, policy: str) -> None:
    with pytest.raises(CorpusError, match=r"conversations of more than data\.seq_len=12 .* set data\.overlong"):
        training(folder, path="talk", seq_len=12)
    data = training(folder, path="talk", seq_len=12, overlong=policy)
    lengths = Corpus(folder / "talk").document_lengths
    (source,) = data.sources
    assert source.too_long == int((lengths > 12).sum()) > 0
    assert source.documents == (100 if policy == "truncate" else 100 - source.too_long)
    pieces = [n for i in range(source.samples.samples_per_epoch) for n in source.samples[i].document_lengths]
    assert max(pieces) <= 12
    tokens = np.concatenate([source.samples[i].tokens for i in range(source.samples.samples_per_epoch)])
    assert int((tokens >= 30).sum()) == int(
        (lengths[lengths <= 12] if policy == "drop" else lengths.clip(max=12)).sum()
    )


def test_conversations_need_the_document_mask(folder: Path) -> None:
    with pytest.raises(CorpusError, match=r"holds conversations, .* set data\.document_mask=true"):
        training(folder, path="talk", document_mask=False)
    with pytest.raises(CorpusError, match=r"which Megatron's order would cut; set data\.index_compat=none"):
        training(folder, path="talk", index_compat="megatron")


def test_held_out_corpora_have_names(folder: Path) -> None:
    config = {"model": {"vocab_size": VOCAB}, "data": {"seq_len": SEQ_LEN}}
    config["data"]["validation_sources"] = {"first": str(folder / "a"), "talks": str(folder / "talk")}
    held_out = open_validation_data(Config.model_validate(config))
    assert list(held_out) == ["first", "talks"]
    assert held_out["first"].samples[0].tokens.tolist() == read_line(folder / "a", SEQ_LEN)
    assert (held_out["talks"].samples[0].tokens[0], held_out["talks"].tokens) == (
        30,
        tokens_of(folder / "talk"),
    )


def read_line(prefix: Path, count: int) -> list[int]:
    corpus = Corpus(prefix)
    return [t for d in range(corpus.documents) for t in corpus.read(d).tolist()][:count]


def tokens_of(prefix: Path) -> int:
    return Corpus(prefix).tokens


TWO = {"a": {"path": "a", "weight": 1.0}, "b": {"path": "b", "weight": 1.0}}


@pytest.mark.parametrize(
    "change",
    [
        {"sources": {**TWO, "a": {"path": "a", "weight": 2.0}}},
        {"sources": {**TWO, "b": {"path": "a", "weight": 1.0, "max_document_tokens": 30}}},
        {"sources": {"a": TWO["a"], "c": TWO["b"]}},
        {"sources": {**TWO, "a": {"path": "a", "weight": 1.0, "min_document_tokens": 5}}},
        {"sources": TWO, "packing": "best_fit"},
    ],
)
def test_every_change_of_the_data_changes_its_identity(folder: Path, change: dict[str, Any]) -> None:
    assert training(folder, **change).identity != training(folder, sources=TWO).identity


def test_what_changes_no_sample_leaves_the_identity(folder: Path, tmp_path: Path) -> None:
    before = training(folder, sources=TWO)
    reordered = training(folder, sources=dict(reversed(TWO.items())))
    assert reordered.identity == before.identity
    assert [reordered[i].tokens.tolist() for i in range(20)] == [before[i].tokens.tolist() for i in range(20)]
    # Neither where a corpus lies, nor a filter that filters nothing, nor rules that only conversations read.
    for suffix in (".bin", ".idx", ".meta.json"):
        shutil.copy(folder / f"a{suffix}", tmp_path / f"moved{suffix}")
    assert training(tmp_path, path="moved").identity == training(folder, path="a", overlong="drop").identity
    one = {"a": {"path": "a", "min_document_tokens": 1}}
    assert training(folder, sources=one)[3].tokens.tolist() == training(folder, path="a")[3].tokens.tolist()


def test_extreme_weights_are_taken_exactly(folder: Path) -> None:
    huge = {name: {**source, "weight": 1e308} for name, source in TWO.items()}
    assert training(folder, sources=huge).shares == [0.5, 0.5]


def test_the_same_documents_twice_are_refused(folder: Path) -> None:
    with pytest.raises(CorpusError, match="'a' and 'again' are the same documents"):
        training(folder, sources={"a": {"path": "a"}, "again": {"path": "a"}})


def test_filters_select_conversations_too(folder: Path) -> None:
    (source,) = training(folder, sources={"talk": {"path": "talk", "max_document_tokens": 8}}).sources
    assert source.documents == int((Corpus(folder / "talk").document_lengths <= 8).sum()) > 0
    pieces = [n for i in range(source.samples.samples_per_epoch) for n in source.samples[i].document_lengths]
    assert len([n for n in pieces if n > 8]) <= source.samples.samples_per_epoch  # nothing but padding


def test_assistant_spans_at_the_edges(tmp_path: Path) -> None:
    """A first token has nothing to be learned from; a last one has no label after it."""
    with CorpusWriter(tmp_path / "edges", vocab_size=VOCAB, with_spans=True) as writer:
        writer.add_document([1, 2, 3, 4], spans=np.array([[0, 1], [3, 4]]))
    (source,) = training(tmp_path, path="edges").sources
    assert source.samples[0].labels[:4].tolist() == [IGNORE_INDEX, IGNORE_INDEX, 4, IGNORE_INDEX]
    assert source.samples[0].document_lengths == [4, SEQ_LEN - 4]


def test_the_label_at_a_truncation_is_the_next_token(tmp_path: Path) -> None:
    with CorpusWriter(tmp_path / "long", vocab_size=VOCAB, with_spans=True) as writer:
        writer.add_document([1, 2, 3, 4, 5, 6], spans=np.array([[2, 6]]))
    (source,) = training(tmp_path, path="long", seq_len=4, overlong="truncate").sources
    assert source.samples[0].tokens.tolist() == [1, 2, 3, 4]
    assert source.samples[0].labels.tolist() == [IGNORE_INDEX, 3, 4, 5]


def test_megatrons_order_depends_on_the_runs_length_and_split(folder: Path) -> None:
    whole = training(folder, path="a", index_compat="megatron")
    assert whole.identity["order"] == {"kind": "megatron", "samples": 80, "split": None}
    part = training(folder, path="a", index_compat="megatron", megatron_split=[2, 1])
    assert part.sources[0].documents == 200
    documents = {int(d) for i in range(80) for d in part.sources[0].samples.order.locate(i).documents}
    assert max(documents) < 200
