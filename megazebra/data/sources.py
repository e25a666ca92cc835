"""The corpora of a run, as its configuration names them, and the mixture they are drawn from."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megazebra.config.schema import Config, DataConfig, SourceConfig
from megazebra.data.corpus.indexed_corpus import Corpus
from megazebra.data.errors import CorpusError
from megazebra.data.index.blend import Blend
from megazebra.data.index.documents import Documents
from megazebra.data.index.megatron_order import MegatronOrder
from megazebra.data.index.order import SampleOrder
from megazebra.data.index.packing import PackedOrder
from megazebra.data.samples import ChunkedSamples, PackedSamples, Sample

CorpusSamples = ChunkedSamples | PackedSamples


@dataclass(frozen=True)
class Source:
    """One corpus of a run as samples.

    tokens, documents: those its filter lets through. too_long: conversations left out or cut.
    """

    name: str
    corpus: Corpus
    samples: CorpusSamples
    tokens: int
    documents: int
    too_long: int = 0


class TrainingData:
    """The sources of a run mixed by weight: sample i is a function of i alone (Blend), whatever the run's length.

    shares: of the samples, one per source, adding up to 1.
    identity: what the samples depend on, in words, by name; a resumed run has to find it unchanged.
    """

    def __init__(self, sources: list[Source], shares: list[float], identity: dict[str, str]) -> None:
        self.sources = sources
        self.shares = shares
        self.identity = identity
        self._blend = Blend(shares)

    def __getitem__(self, index: int) -> Sample:
        source, own_index = self._locate(index)
        return replace(self.sources[source].samples[own_index], index=index)

    def document_lengths(self, index: int) -> list[int]:
        source, own_index = self._locate(index)
        return self.sources[source].samples.document_lengths(own_index)

    def epochs(self, samples: int) -> dict[str, float]:
        """How often each source has been gone through after that many samples of the run."""
        counts = self._blend.counts(samples)
        return {
            source.name: int(count) / source.samples.samples_per_epoch
            for source, count in zip(self.sources, counts, strict=True)
        }

    def _locate(self, index: int) -> tuple[int, int]:
        sources, indices = self._blend.locate(index, 1)
        return int(sources[0]), int(indices[0])


def open_training_data(config: Config) -> TrainingData:
    """The training corpora, opened and laid out as samples.

    Raises CorpusError for a missing, damaged or empty corpus, a filter that leaves less than one sample, and
    conversations longer than data.seq_len under data.overlong=error.
    """
    data = config.data
    named = data.sources
    if data.path is not None:
        named = {Path(data.path).name: SourceConfig(path=data.path)}
    if not named:
        raise CorpusError(
            "data.path is not set; give the prefix of a corpus that tools/preprocess_data.py has written, "
            "or several as data.sources"
        )
    sources = []
    identity = {
        "order": data.index_compat if data.index_compat == "none" else f"Megatron's of {_run_samples(config)} samples"
    }
    for name, wanted in named.items():
        field = "data.path" if data.path is not None else f"data.sources.{name}.path"
        corpus = Corpus.open(
            wanted.path,
            vocab_size=config.model.vocab_size,
            field=field,
            by_sequence=data.index_compat == "megatron",
        )
        sources.append(_training_source(name, corpus, wanted, config))
    weights = [wanted.weight or source.tokens for wanted, source in zip(named.values(), sources, strict=True)]
    shares = [weight / sum(weights) for weight in weights]
    for source, wanted, share in zip(sources, named.values(), shares, strict=True):
        selected = f"{wanted.min_document_tokens} to {wanted.max_document_tokens or 'any number of'} tokens"
        identity[f"source {source.name}"] = (
            f"share {share!r}, documents of {selected}, corpus {source.corpus.fingerprint[:16]}"
        )
    return TrainingData(sources, shares, identity)


def open_validation_data(config: Config) -> dict[str, Source]:
    """The held-out corpora by name, in their natural order; '' names that of data.validation_path."""
    data = config.data
    named = {"": data.validation_path} if data.validation_path is not None else data.validation_sources
    sources = {}
    for name, path in named.items():
        field = f"data.validation_sources.{name}" if name else "data.validation_path"
        corpus = Corpus.open(path, vocab_size=config.model.vocab_size, field=field)
        if corpus.has_spans:
            sources[name] = _conversations(name, corpus, None, data, config.train.seed, shuffle=False)
        else:
            order = SampleOrder(corpus.layout, data.seq_len, shuffle=False, source=repr(corpus.prefix))
            samples = ChunkedSamples(corpus, order, document_mask=data.document_mask)
            sources[name] = Source(name, corpus, samples, corpus.tokens, corpus.documents)
    return sources


def _training_source(name: str, corpus: Corpus, wanted: SourceConfig, config: Config) -> Source:
    data, seed = config.data, config.train.seed
    documents = _select(corpus, wanted.min_document_tokens, wanted.max_document_tokens, f"data.sources.{name}")
    if corpus.has_spans:
        if data.index_compat == "megatron":
            raise CorpusError(
                f"{corpus.prefix!r} holds conversations, which Megatron's order would cut; set data.index_compat=none"
            )
        return _conversations(name, corpus, documents, data, seed, shuffle=True)
    layout = corpus.layout if documents is None else Documents(corpus.document_lengths[documents])
    described = repr(corpus.prefix)
    order: SampleOrder | PackedOrder | MegatronOrder
    if data.index_compat == "megatron":
        order = MegatronOrder(layout.lengths, data.seq_len, seed, _run_samples(config), source=described)
    elif data.packing == "best_fit":
        order = PackedOrder(layout, data.seq_len, seed, _key(corpus, wanted), source=described)
        packed = PackedSamples(corpus, order, data.seq_len, padding_id=_padding_id(corpus), documents=documents)
        return Source(name, corpus, packed, layout.tokens, len(layout))
    else:
        order = SampleOrder(layout, data.seq_len, seed, _key(corpus, wanted), source=described)
    chunked = ChunkedSamples(corpus, order, document_mask=data.document_mask, documents=documents)
    return Source(name, corpus, chunked, layout.tokens, len(layout))


def _conversations(
    name: str, corpus: Corpus, documents: NDArray[np.int64] | None, data: DataConfig, seed: int, *, shuffle: bool
) -> Source:
    """Instruction data: conversations packed whole."""
    if not data.document_mask:
        raise CorpusError(
            f"{corpus.prefix!r} holds conversations, several to a sequence; set data.document_mask=true so that "
            "they don't see each other"
        )
    lengths = corpus.document_lengths if documents is None else corpus.document_lengths[documents]
    too_long = int(np.count_nonzero(lengths > data.seq_len))
    if too_long and data.overlong == "error":
        raise CorpusError(
            f"{corpus.prefix!r} has {too_long} conversations of more than data.seq_len={data.seq_len} tokens (the "
            f"longest has {lengths.max()}); raise data.seq_len, or set data.overlong to drop or truncate"
        )
    if data.overlong == "drop" and too_long:
        fitting = np.flatnonzero(lengths <= data.seq_len)
        documents = fitting if documents is None else documents[fitting]
        lengths = lengths[fitting]
    layout = Documents(np.minimum(lengths, data.seq_len))
    order = PackedOrder(
        layout, data.seq_len, seed, corpus.fingerprint, split=False, shuffle=shuffle, source=repr(corpus.prefix)
    )
    samples = PackedSamples(
        corpus,
        order,
        data.seq_len,
        padding_id=_padding_id(corpus),
        assistant_only=data.loss_on == "assistant",
        documents=documents,
    )
    return Source(name, corpus, samples, layout.tokens, len(layout), too_long)


def _select(corpus: Corpus, shortest: int, longest: int | None, field: str) -> NDArray[np.int64] | None:
    """The documents within the bounds; None where all are."""
    if shortest <= 1 and longest is None:
        return None
    lengths = corpus.document_lengths
    fitting = lengths >= shortest
    if longest is not None:
        fitting &= lengths <= longest
    documents = np.flatnonzero(fitting)
    if not documents.size:
        raise CorpusError(
            f"{field}: no document of {corpus.prefix!r} has {shortest} to {longest or 'any number of'} tokens, the "
            f"longest has {lengths.max()}; change min_document_tokens or max_document_tokens"
        )
    return documents


def _key(corpus: Corpus, wanted: SourceConfig) -> str:
    """What the shuffles of a source are keyed by: two filters of one corpus are two sources."""
    if wanted.min_document_tokens == 0 and wanted.max_document_tokens is None:
        return corpus.fingerprint
    selection = f"{corpus.fingerprint} {wanted.min_document_tokens} {wanted.max_document_tokens}"
    return hashlib.sha256(selection.encode()).hexdigest()


def _padding_id(corpus: Corpus) -> int:
    """Any token would do, since nothing is learned on padding; EOD is at home in every vocabulary."""
    return corpus.meta.eod_id or 0 if corpus.meta else 0


def _run_samples(config: Config) -> int:
    return config.train.steps * config.train.global_batch_size
