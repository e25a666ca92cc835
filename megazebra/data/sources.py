"""The corpora of a run, as its configuration names them, and the mixture they are drawn from."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

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

# Part of every run's identity: raise it when the same configuration and corpora come to give other samples.
ORDER_VERSION = 1
ONLY_SOURCE = "corpus"  # what data.path is called; not by its path, since a corpus may move


@dataclass(frozen=True)
class Source:
    """One corpus of a run as samples.

    tokens, documents: those that its filter lets through. padding: share of its samples' tokens.
    too_long: conversations left out or cut. identity: what its samples depend on.
    """

    name: str
    corpus: Corpus
    samples: ChunkedSamples | PackedSamples
    tokens: int
    documents: int
    identity: dict[str, Any]
    padding: float = 0.0
    too_long: int = 0


class TrainingData:
    """The sources of a run mixed by weight: sample i is a function of i alone (Blend), whatever the run's length.

    weights: ratios of the samples drawn from each source. identity: what the samples depend on, as JSON has it; a
    resumed run has to find it unchanged.
    """

    def __init__(self, sources: list[Source], weights: list[float], order: dict[str, Any]) -> None:
        self.sources = sources
        self.identity = {
            "order": order,
            "sources": {
                source.name: {"weight": weight, **source.identity}
                for source, weight in zip(sources, weights, strict=True)
            },
        }
        self._blend = Blend(weights)
        self.shares = [numerator / sum(self._blend.numerators) for numerator in self._blend.numerators]

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

    Raises CorpusError for a missing, damaged or empty corpus, a filter that leaves less than one sample, the same
    documents under two names, and conversations longer than data.seq_len under data.overlong=error.
    """
    data = config.data
    named = data.sources if data.path is None else {ONLY_SOURCE: SourceConfig(path=data.path)}
    if not named:
        raise CorpusError(
            "data.path is not set; give the prefix of a corpus that tools/preprocess_data.py has written, "
            "or several as data.sources"
        )
    corpora: dict[str, Corpus] = {}  # a corpus may serve several sources
    sources: list[Source] = []
    # By name, so that the order in which they are written down is of no consequence.
    for name, wanted in sorted(named.items()):
        if wanted.path not in corpora:
            corpora[wanted.path] = Corpus(
                wanted.path,
                vocab_size=config.model.vocab_size,
                field="data.path" if data.path is not None else f"data.sources.{name}.path",
                by_sequence=data.index_compat == "megatron",
            )
        source = _training_source(name, corpora[wanted.path], wanted, config)
        for other in sources:
            if other.identity == source.identity:
                raise CorpusError(
                    f"data.sources: {other.name!r} and {name!r} are the same documents, which would give every sample "
                    "twice; keep one, with the sum of the weights"
                )
        sources.append(source)
    weights = [named[source.name].weight or source.tokens for source in sources]
    return TrainingData(sources, weights, _order_identity(config))


def open_validation_data(config: Config) -> dict[str, Source]:
    """The held-out corpora by name, in their natural order; '' names that of data.validation_path."""
    data = config.data
    named = {"": data.validation_path} if data.validation_path is not None else data.validation_sources
    sources = {}
    for name, path in named.items():
        field = f"data.validation_sources.{name}" if name else "data.validation_path"
        corpus = Corpus(path, vocab_size=config.model.vocab_size, field=field)
        if corpus.has_spans:
            sources[name] = _conversations(name, corpus, SourceConfig(path=path), config, field, shuffle=False)
        else:
            order = SampleOrder(corpus.layout, data.seq_len, shuffle=False, source=f"{field}={path!r}")
            samples = ChunkedSamples(corpus, order, document_mask=data.document_mask)
            identity = {"corpus": corpus.fingerprint}
            sources[name] = Source(name, corpus, samples, corpus.tokens, corpus.documents, identity)
    return sources


def _training_source(name: str, corpus: Corpus, wanted: SourceConfig, config: Config) -> Source:
    data, seed = config.data, config.train.seed
    field = f"data.path={wanted.path!r}" if data.path is not None else f"data.sources.{name}"
    if corpus.has_spans:
        if data.index_compat == "megatron":
            raise CorpusError(
                f"{field} holds conversations, which Megatron's order would cut; set data.index_compat=none"
            )
        return _conversations(name, corpus, wanted, config, field, shuffle=True)
    documents = _select(corpus, wanted, field)
    layout = corpus.layout if documents is None else Documents(corpus.document_lengths[documents])
    identity = _identity(corpus, wanted, packing=data.packing)
    if data.index_compat == "megatron":
        part = _train_part(layout.lengths, data)
        megatron = MegatronOrder(part, data.seq_len, seed, _run_samples(config), source=field)
        chunked = ChunkedSamples(corpus, megatron, document_mask=data.document_mask)
        return Source(name, corpus, chunked, int(part.sum(dtype=np.int64)), len(part), identity)
    key = _shuffle_key(corpus, wanted)
    if data.packing == "concatenate":
        order = SampleOrder(layout, data.seq_len, seed, key, source=field)
        chunked = ChunkedSamples(corpus, order, document_mask=data.document_mask, documents=documents)
        return Source(name, corpus, chunked, layout.tokens, len(layout), identity)
    packed_order = PackedOrder(layout, data.seq_len, seed, key, source=field)
    packed = PackedSamples(corpus, packed_order, data.seq_len, padding_id=_padding_id(corpus), documents=documents)
    return Source(name, corpus, packed, layout.tokens, len(layout), identity, packed_order.padding)


def _conversations(
    name: str, corpus: Corpus, wanted: SourceConfig, config: Config, field: str, *, shuffle: bool
) -> Source:
    """Instruction data: conversations packed whole."""
    data = config.data
    if not data.document_mask:
        raise CorpusError(
            f"{field} holds conversations, several to a sequence; set data.document_mask=true so that they don't see "
            "each other"
        )
    documents = _select(corpus, wanted, field)
    lengths = corpus.document_lengths if documents is None else corpus.document_lengths[documents]
    too_long = int(np.count_nonzero(lengths > data.seq_len))
    if too_long and data.overlong == "error":
        raise CorpusError(
            f"{field} has {too_long} conversations of more than data.seq_len={data.seq_len} tokens (the longest has "
            f"{lengths.max()}); raise data.seq_len, or set data.overlong to drop or truncate"
        )
    if too_long == len(lengths) and data.overlong == "drop":
        raise CorpusError(
            f"{field}: data.overlong=drop leaves nothing, every conversation has more than data.seq_len={data.seq_len} "
            "tokens; raise data.seq_len, or truncate"
        )
    if too_long and data.overlong == "drop":
        fitting = np.flatnonzero(lengths <= data.seq_len)
        documents = fitting if documents is None else documents[fitting]
        lengths = lengths[fitting]
    layout = Documents(np.minimum(lengths, data.seq_len))
    order = PackedOrder(
        layout,
        data.seq_len,
        config.train.seed,
        _shuffle_key(corpus, wanted),
        split=False,
        shuffle=shuffle,
        source=field,
    )
    samples = PackedSamples(
        corpus,
        order,
        data.seq_len,
        padding_id=_padding_id(corpus),
        assistant_only=data.loss_on == "assistant",
        documents=documents,
    )
    identity = _identity(corpus, wanted, loss_on=data.loss_on, overlong=data.overlong)
    return Source(name, corpus, samples, layout.tokens, len(layout), identity, order.padding, too_long)


def _select(corpus: Corpus, wanted: SourceConfig, field: str) -> NDArray[np.integer] | None:
    """The numbers of the documents within the bounds, as small integers as hold them; None where all are."""
    shortest, longest = wanted.min_document_tokens, wanted.max_document_tokens
    if not wanted.filters:
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
    return documents.astype(np.uint32) if len(lengths) <= 2**32 else documents


def _identity(corpus: Corpus, wanted: SourceConfig, **rules: str) -> dict[str, Any]:
    bounds = {"min_document_tokens": wanted.min_document_tokens, "max_document_tokens": wanted.max_document_tokens}
    return {"corpus": corpus.fingerprint, **(bounds if wanted.filters else {}), **rules}


def _shuffle_key(corpus: Corpus, wanted: SourceConfig) -> str:
    """Two filters of one corpus are two sources, each in an order of its own."""
    bounds = f"/{wanted.min_document_tokens}/{wanted.max_document_tokens}" if wanted.filters else ""
    return corpus.fingerprint + bounds


def _order_identity(config: Config) -> dict[str, Any]:
    if config.data.index_compat == "none":
        return {"kind": "default", "version": ORDER_VERSION}
    return {"kind": "megatron", "samples": _run_samples(config), "split": config.data.megatron_split}


def _run_samples(config: Config) -> int:
    return config.train.steps * config.train.global_batch_size


def _train_part(lengths: NDArray[np.integer], data: DataConfig) -> NDArray[np.integer]:
    """The sequences that Megatron trains on under --split: the first ones, by their share."""
    if data.megatron_split is None:
        return lengths
    share = data.megatron_split[0] / sum(data.megatron_split)
    return lengths[: round(share * len(lengths))]


def _padding_id(corpus: Corpus) -> int:
    """Any token would do, since nothing is learned on padding; EOD is at home in every vocabulary."""
    return (corpus.meta.eod_id or 0) if corpus.meta else 0
