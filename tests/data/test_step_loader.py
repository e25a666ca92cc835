"""Micro-batches: labels, positions and boundaries against plain Python, and one order whatever the layout."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from megazebra.data.batch import collate
from megazebra.data.corpus.corpus_writer import CorpusWriter
from megazebra.data.corpus.indexed_corpus import Corpus
from megazebra.data.index.order import SampleOrder
from megazebra.data.loader import StepLoader, validation_batches
from megazebra.data.samples import ChunkedSamples, Sample
from megazebra.labels import IGNORE_INDEX

EOD = 0
SEQ_LEN = 16


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """200 documents of 0 to 39 tokens and EOD."""
    random = np.random.default_rng(0)
    prefix = tmp_path_factory.mktemp("corpus") / "train"
    with CorpusWriter(prefix, vocab_size=100, eod_id=EOD) as writer:
        writer.add_documents([[*random.integers(1, 100, random.integers(0, 40)), EOD] for _ in range(200)])
    return Corpus(prefix)


def chunked(corpus: Corpus, *, seed: int = 1, shuffle: bool = True, document_mask: bool = True) -> ChunkedSamples:
    order = SampleOrder(corpus.layout, SEQ_LEN, seed, corpus.fingerprint, shuffle=shuffle)
    return ChunkedSamples(corpus, order, document_mask=document_mask)


@pytest.fixture(scope="module")
def samples(corpus):
    return chunked(corpus)


def naive_rows(corpus: Corpus, samples: ChunkedSamples, index: int, document_mask: bool):
    """Tokens, labels, positions and document lengths, one token at a time."""
    pieces = zip(*(column.tolist() for column in samples.order.locate(index)), strict=True)
    line = [(d, int(t)) for d, start, n in pieces for t in corpus.read(d, start, n)]
    tokens, labels, positions, lengths = [], [], [], []
    document = None
    for here, after in itertools.pairwise(line):
        if here[0] != document:
            document = here[0]
            lengths.append(0)
        lengths[-1] += 1
        tokens.append(here[1])
        labels.append(IGNORE_INDEX if document_mask and after[0] != here[0] else after[1])
        positions.append(lengths[-1] - 1 if document_mask else len(positions))
    return tokens, labels, positions, lengths


@pytest.mark.parametrize("document_mask", [True, False])
def test_rows_match_the_naive_construction(corpus, document_mask):
    samples = chunked(corpus, document_mask=document_mask)
    indices = list(range(samples.samples_per_epoch))
    batch = collate([samples[i] for i in indices], document_mask=document_mask)
    expected = [naive_rows(corpus, samples, i, document_mask) for i in indices]
    assert batch.sample_indices == indices
    assert batch.tokens_BS.tolist() == [row[0] for row in expected]
    assert batch.labels_BS.tolist() == [row[1] for row in expected]
    assert batch.positions_BS.tolist() == [row[2] for row in expected]
    assert batch.document_lengths == ([row[3] for row in expected] if document_mask else None)
    assert batch.valid_tokens == sum(label != IGNORE_INDEX for row in expected for label in row[1])
    for tensor in (batch.tokens_BS, batch.labels_BS, batch.positions_BS):
        assert tensor.dtype == torch.int64
        assert tensor.is_contiguous()


def test_every_end_of_document_is_without_label_under_the_mask(samples):
    batch = collate([samples[i] for i in range(samples.samples_per_epoch)], document_mask=True)
    assert torch.equal(batch.labels_BS == IGNORE_INDEX, batch.tokens_BS == EOD)


@pytest.mark.parametrize(("document_mask", "label"), [(True, IGNORE_INDEX), (False, 3)])
def test_document_that_ends_with_the_inputs(tmp_path, document_mask, label):
    """Its label would be the next document's first token, which lies only in the L + 1st place."""
    with CorpusWriter(tmp_path / "two", vocab_size=10) as writer:
        writer.add_documents([[1] * (SEQ_LEN - 1) + [EOD], [3] * SEQ_LEN])
    sample = chunked(Corpus(tmp_path / "two"), shuffle=False, document_mask=document_mask)[0]
    assert sample.document_lengths == [SEQ_LEN]
    assert sample.labels.tolist() == [1] * (SEQ_LEN - 2) + [EOD, label]


def test_batch_moves_to_a_device(samples):
    batch = collate([samples[0]], document_mask=True)
    moved = batch.to("meta")
    assert moved.tokens_BS.device.type == moved.labels_BS.device.type == moved.positions_BS.device.type == "meta"
    assert moved.document_lengths == batch.document_lengths


def test_pinned_tensors_are_whole(samples, monkeypatch):
    """Only contiguous memory can be pinned, which a context slice is not; what pins is stood in for, without a GPU."""
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(self) or self)
    part = collate([samples[0], samples[1]], document_mask=True).context_slice(1, 2)
    batch = part.pinned()
    assert [id(tensor) for tensor in pinned] == [id(t) for t in (batch.tokens_BS, batch.labels_BS, batch.positions_BS)]
    assert all(tensor.is_contiguous() for tensor in pinned)
    assert torch.equal(batch.labels_BS, part.labels_BS)


@pytest.mark.parametrize("document_mask", [True, False])
def test_padding_comes_last_and_teaches_nothing(samples, document_mask):
    batch = collate([samples[0], samples[1]], document_mask=document_mask)
    S = batch.tokens_BS.shape[1]
    padded = batch.padded(S + 3)
    assert padded.tokens_BS.shape == padded.positions_BS.shape == (2, S + 3)
    assert torch.equal(padded.tokens_BS[:, :S], batch.tokens_BS)
    assert torch.equal(padded.labels_BS[:, :S], batch.labels_BS)
    assert (padded.labels_BS[:, S:] == IGNORE_INDEX).all()
    assert (padded.valid_tokens, padded.seq_len) == (batch.valid_tokens, S)
    if document_mask:
        assert padded.document_lengths == [[*row, 3] for row in batch.document_lengths]
    else:
        assert padded.document_lengths is None
    assert batch.padded(S) is batch


def step_rows(samples, consumed, dp_size, micro_batch_size, global_batch_size=8):
    """(index, tokens) of a step over all ranks, in the order of the ranks."""
    rows = []
    for rank in range(dp_size):
        loader = StepLoader(
            samples,
            global_batch_size=global_batch_size,
            micro_batch_size=micro_batch_size,
            dp_rank=rank,
            dp_size=dp_size,
        )
        batches = loader.next_step(consumed)
        assert len(batches) == global_batch_size // (dp_size * micro_batch_size)
        assert all(batch.tokens_BS.shape == (micro_batch_size, SEQ_LEN) for batch in batches)
        rows += [row for batch in batches for row in zip(batch.sample_indices, batch.tokens_BS.tolist(), strict=True)]
    return rows


@pytest.mark.parametrize("dp_size", [1, 2, 4])
@pytest.mark.parametrize("micro_batch_size", [1, 2])
def test_same_samples_whatever_the_layout(samples, dp_size, micro_batch_size):
    expected = [(i, samples[i].tokens.tolist()) for i in range(32)]
    found = [row for step in range(4) for row in step_rows(samples, 8 * step, dp_size, micro_batch_size)]
    assert found == expected


def test_resuming_continues_the_undisturbed_run(corpus, samples):
    """From any integer, under another layout, in a fresh process's objects, across an epoch."""
    start = samples.samples_per_epoch - 12
    undisturbed = [row for step in range(4) for row in step_rows(samples, start + 8 * step, 1, 4)]
    fresh = chunked(corpus)
    resumed = [row for step in range(2, 4) for row in step_rows(fresh, start + 8 * step, 4, 1)]
    assert resumed == undisturbed[16:]


def test_unequal_micro_batches_are_refused(samples):
    with pytest.raises(ValueError, match=r"train\.global_batch_size=6 .* take a multiple of 4"):
        StepLoader(samples, global_batch_size=6, micro_batch_size=2, dp_size=2)
    with pytest.raises(ValueError, match="dp_rank=2 is outside"):
        StepLoader(samples, global_batch_size=8, micro_batch_size=2, dp_rank=2, dp_size=2)


@pytest.mark.parametrize("dp_size", [1, 2, 4])
@pytest.mark.parametrize("micro_batch_size", [1, 3])
@pytest.mark.parametrize("num_samples", [1, 10, 10_000])
def test_validation_is_the_same_set_in_equal_counts(corpus, dp_size, micro_batch_size, num_samples):
    samples = chunked(corpus, shuffle=False)
    ranks = [
        list(validation_batches(samples, num_samples, micro_batch_size=micro_batch_size, dp_rank=rank, dp_size=dp_size))
        for rank in range(dp_size)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    batches = [batch for batches in ranks for batch in batches]
    assert all(batch.tokens_BS.shape == (micro_batch_size, SEQ_LEN) for batch in batches)
    available = min(num_samples, samples.samples_per_epoch)
    whole = collate([samples[i] for i in range(available)], document_mask=True)
    assert sorted(i for batch in batches for i in batch.sample_indices if i >= 0) == list(range(available))
    assert sum(batch.valid_tokens for batch in batches) == whole.valid_tokens
    for batch in batches:
        for row, index in enumerate(batch.sample_indices):
            assert index >= 0 or (batch.labels_BS[row] == IGNORE_INDEX).all()


class DocumentsOnly:
    """Samples whose cost is all that matters: document i is as long as it is dear."""

    def __init__(self, lengths: list[list[int]]) -> None:
        self.lengths = lengths

    def document_lengths(self, index: int) -> list[int]:
        return self.lengths[index]

    def __getitem__(self, index: int) -> Sample:
        row = np.zeros(SEQ_LEN, np.int64)
        return Sample(row, row, row, self.lengths[index], index)


def squares(document_lengths: list[int]) -> float:
    return float(sum(length**2 for length in document_lengths))


@pytest.mark.parametrize("dp_size", [1, 2, 4])
def test_balanced_ranks_take_the_same_samples_with_even_work(dp_size):
    random = np.random.default_rng(3)
    samples = DocumentsOnly([[n, SEQ_LEN - n] for n in random.integers(1, SEQ_LEN // 2, 64).tolist()])
    ranks = []
    for rank in range(dp_size):
        loader = StepLoader(
            samples, global_batch_size=32, micro_batch_size=2, dp_rank=rank, dp_size=dp_size, cost=squares
        )
        ranks.append([batch.sample_indices for batch in loader.next_step(32)])
    taken = [[i for batch in batches for i in batch] for batches in ranks]
    assert sorted(i for rank in taken for i in rank) == list(range(32, 64))
    assert {len(rank) for rank in taken} == {32 // dp_size}
    work = [sum(squares(samples.lengths[i]) for i in rank) for rank in taken]
    neighbours = [
        sum(squares(samples.lengths[i]) for i in range(32 + r * 32 // dp_size, 32 + (r + 1) * 32 // dp_size))
        for r in range(dp_size)
    ]
    assert max(work) <= max(neighbours)
    assert max(work) - min(work) <= SEQ_LEN**2 / 2  # no more than two samples can differ by
