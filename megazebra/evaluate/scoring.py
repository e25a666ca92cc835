"""Examples through a model, sharded over all ranks: samples over dp, sequences over cp, the vocabulary over tp.

Shapes: B sequences of a batch, S tokens of a sequence (of this context-parallel rank once it is sliced).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from megazebra.data.batch import MicroBatch
from megazebra.evaluate.cell import NOT_ASKED, Cell, Example, Tally
from megazebra.evaluate.results import Row
from megazebra.labels import IGNORE_INDEX
from megazebra.parallel.collectives import all_reduce
from megazebra.parallel.mesh import ParallelMesh

DEFAULT_BATCH_TOKENS = 16384


def evaluate_model(
    model: nn.Module,
    mesh: ParallelMesh,
    device: torch.device,
    cells: Iterable[Cell],
    *,
    batch_tokens: int = DEFAULT_BATCH_TOKENS,
    on_cell: Callable[[list[Row]], None] = lambda rows: None,
) -> list[Row]:
    """The rows of all cells, the same on every rank, and the same numbers under every layout, to rounding.

    Every rank calls it with the same cells. model: a ZebraModel, or the DeepSpeed engine around one (under ZeRO-3
    weights are gathered only when the engine is called). batch_tokens: of a forward pass on one data-parallel rank, at
    least one sequence. on_cell: hears of every cell's rows as they come.
    """
    rows = []
    with evaluating(model):
        for cell in cells:
            found = cell.rows(tally(model, mesh, device, cell, batch_tokens))
            on_cell(found)
            rows += found
    return rows


def tally(model: nn.Module, mesh: ParallelMesh, device: torch.device, cell: Cell, batch_tokens: int) -> Tally:
    """The scores of all the cell's examples, summed by bin over all ranks, in float64."""
    sums = np.zeros((3, cell.bins))
    for examples in _own_batches(cell, mesh, batch_tokens):
        batch, bins_BS = _sliced(examples, cell.length, mesh)
        batch = batch.to(device)
        scores_2BS: Tensor = model(
            batch.tokens_BS, batch.labels_BS, batch.positions_BS, reduction="scores", seq_len=batch.seq_len
        )
        # Added up on the host, in one order: atomic additions on a GPU have none.
        loss_BS, hits_BS = scores_2BS.double().cpu().numpy()
        is_asked = bins_BS != NOT_ASKED
        bins = bins_BS[is_asked]
        for line, weights in zip(sums, (None, loss_BS[is_asked], hits_BS[is_asked]), strict=True):
            line += np.bincount(bins, weights, minlength=cell.bins)
    summed = all_reduce(torch.from_numpy(sums).to(device), mesh.dp_cp, label="evaluation")
    return Tally(*summed.cpu().numpy())


def _own_batches(cell: Cell, mesh: ParallelMesh, batch_tokens: int) -> Iterator[list[Example]]:
    """This data-parallel rank's batches. Every rank gets as many, since forward passes contain collectives.

    The batches are the same under any layout; they are dealt out in turn, and where there are no more a rank repeats
    the first, with nothing asked.
    """
    size = max(1, batch_tokens // cell.length)
    starts = range(0, cell.samples, size)
    for turn in range(0, len(starts), mesh.dp.size):
        own = turn + mesh.dp.rank
        if own < len(starts):
            yield [cell.example(index) for index in range(starts[own], min(starts[own] + size, cell.samples))]
        else:
            filler = cell.example(0)
            yield [Example(filler.tokens, np.full_like(filler.bins, NOT_ASKED))]


def _sliced(examples: list[Example], length: int, mesh: ParallelMesh) -> tuple[MicroBatch, np.ndarray]:
    """This context-parallel rank's part of the examples' inputs and labels, and the labels' bins [B, S].

    Shorter examples are filled up behind their end, which no token of theirs sees.
    """
    longest = max(len(example.tokens) for example in examples)
    tokens = np.zeros((len(examples), longest), dtype=np.int64)
    bins = np.full((len(examples), longest), NOT_ASKED)
    for row, example in enumerate(examples):
        tokens[row, : len(example.tokens)] = example.tokens
        bins[row, : len(example.bins)] = example.bins
    bins_BS = bins[:, 1:]
    labels_BS = np.where(bins_BS == NOT_ASKED, IGNORE_INDEX, tokens[:, 1:])
    batch = MicroBatch(
        tokens_BS=torch.from_numpy(tokens[:, :-1]),
        labels_BS=torch.from_numpy(labels_BS),
        positions_BS=torch.arange(longest - 1).expand(len(examples), -1),
        document_lengths=None,
        sample_indices=[-1] * len(examples),
        valid_tokens=int((labels_BS != IGNORE_INDEX).sum()),
        # Of the cell: rotary embeddings that look at it must not change with what else is in the batch.
        seq_len=length,
    )
    # With sequence parallelism the tensor-parallel ranks share the sequence too; without it a little padding is lost.
    padded = batch.padded(mesh.cp.size * mesh.tp.size)
    whole = padded.tokens_BS.shape[1]
    bins_BS = np.pad(bins_BS, ((0, 0), (0, whole - bins_BS.shape[1])), constant_values=NOT_ASKED)
    part = slice(mesh.cp.rank * whole // mesh.cp.size, (mesh.cp.rank + 1) * whole // mesh.cp.size)
    return padded.context_slice(mesh.cp.rank, mesh.cp.size), bins_BS[:, part]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """No gradients, and modules in evaluation mode; afterwards as they were."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)
