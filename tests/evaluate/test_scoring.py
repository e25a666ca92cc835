"""Scores of examples, against the logits of the whole model on whole sequences, under every layout."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from models.zebras import CPU, make_model
from stand_ins import random_corpus
from support.distributed import run_distributed
from support.training import make_engine, tiny_config

from megazebra.config.schema import Config
from megazebra.context.choice import resolve_specs
from megazebra.evaluate.cell import NOT_ASKED, Cell, Example, Tally
from megazebra.evaluate.plan import Plan
from megazebra.evaluate.results import Row
from megazebra.evaluate.scoring import evaluate_model, tally
from megazebra.models.zebra import ZebraModel
from megazebra.parallel.mesh import ParallelMesh
from megazebra.train.engine import start_deepspeed

VOCABULARY = 61
# Losses of size 4 in float32, unit roundoff 6e-8, through four layers whose sums run over at most 100 terms in another
# order on other ranks: 1e-5 is ten times what was seen, and a token in the wrong place would change the fourth digit.
LOSS = 1e-5


class RaggedCell:
    """Examples of lengths 2 to 12 whose tokens add to bins in a way that mixes examples."""

    samples, bins, length = 11, 4, 12

    def example(self, index: int) -> Example:
        random = np.random.default_rng(index)
        length = 2 + index
        bins = random.integers(-1, self.bins, length)
        bins[0] = NOT_ASKED
        return Example(random.integers(0, VOCABULARY, length), bins)

    def rows(self, tally: Tally) -> list[Row]:
        return [
            Row(task=f"bin {bin_}", length=12, samples=11, tokens=int(n), loss=loss / n, token_accuracy=hits / n)
            for bin_, (n, loss, hits) in enumerate(zip(*tally, strict=True))
        ]


@torch.no_grad()
def by_hand(model: ZebraModel, cell: Cell) -> Tally:
    """One example after the other, from the logits, in float64."""
    sums = np.zeros((3, cell.bins))
    for example in map(cell.example, range(cell.samples)):
        logits_SV = model(torch.from_numpy(example.tokens[None]))[0].double()
        for place in np.flatnonzero(example.bins != NOT_ASKED).tolist():
            label = int(example.tokens[place])
            loss = -logits_SV[place - 1].log_softmax(-1)[label].item()
            hit = int(logits_SV[place - 1].argmax()) == label
            sums[:, example.bins[place]] += (1, loss, hit)
    return Tally(*sums)


def cells(folder: Path) -> list[Cell]:
    corpus = random_corpus(folder / "corpus", [40, 7, 90, 33], VOCABULARY)
    plan = Plan(
        tasks=["positions", "contexts", "passkey", "kv", "copy"], lengths=[29], depths=[0.5], samples=5,
        contexts=[1, 17], final=9, vocab_size=VOCABULARY, corpus=corpus,
    )  # fmt: skip
    return [RaggedCell(), *plan.cells()]


def model_of(config: Config, mesh: ParallelMesh) -> ZebraModel:
    return make_model(
        config.model, mesh, resolve_specs(config), sequence_parallel=config.parallel.sequence_parallel, loss_chunk=24
    )


def rows_under(configs: list[Config], batch_tokens: int) -> list[list[Row]]:
    with tempfile.TemporaryDirectory() as folder:
        found = []
        for config in configs:
            mesh = ParallelMesh.build(config.parallel)
            model = model_of(config, mesh)
            found.append(evaluate_model(model, mesh, CPU, cells(Path(folder)), batch_tokens=batch_tokens))
        return found


def check_equal(rows: list[Row], expected: list[Row]) -> None:
    assert len(rows) == len(expected)
    for row, other in zip(rows, expected, strict=True):
        assert (row.task, row.length, row.depth, row.start, row.end) == (
            other.task, other.length, other.depth, other.start, other.end,
        )  # fmt: skip
        assert (row.samples, row.tokens) == (other.samples, other.tokens)
        assert row.loss == pytest.approx(other.loss, abs=LOSS)
        # Random weights: no two logits are so close that rounding could swap them (it would show here).
        assert (row.token_accuracy, row.exact_match) == (other.token_accuracy, other.exact_match)


def test_one_process_against_the_logits(tmp_path: Path) -> None:
    config = tiny_config()
    mesh = ParallelMesh.build(config.parallel)
    model = model_of(config, mesh).train()
    for cell in cells(tmp_path):
        expected = by_hand(model, cell)
        for batch_tokens in (1, 40, 10_000):
            found = tally(model, mesh, CPU, cell, batch_tokens)
            np.testing.assert_array_equal(found.tokens, expected.tokens)
            np.testing.assert_array_equal(found.hits, expected.hits)
            np.testing.assert_allclose(found.loss, expected.loss, rtol=0, atol=LOSS * expected.tokens.max())
    rows = evaluate_model(model, mesh, CPU, cells(tmp_path))
    assert model.training, "as it was before"
    assert any(row.token_accuracy for row in rows), "a random model hits something among so many"


def test_every_layout_gives_the_numbers_of_one_process() -> None:
    shallow = {"model__num_layers": 2, "model__pattern": "GL"}
    (alone,) = rows_under([tiny_config(**shallow)], 64)
    layouts = [
        {"parallel__context": 2, "parallel__tensor": 2},
        {"parallel__context": 2},  # and dp 2
        {"parallel__tensor": 2, "parallel__sequence_parallel": True},  # and dp 2
        {"parallel__context": 4, "parallel__context_local": "allgather", "parallel__context_global": "allgather"},
        {},  # dp 4: five samples leave a rank without one
    ]
    for ranks in run_distributed(rows_under, 4, [tiny_config(**shallow, **layout) for layout in layouts], 64):
        for rows in ranks:
            check_equal(rows, alone)


def rows_of_engine(config: Config) -> list[Row]:
    start_deepspeed(CPU, timeout_s=60)
    with tempfile.TemporaryDirectory() as folder:
        engine = make_engine(config)
        rows = evaluate_model(engine.deepspeed, engine.mesh, CPU, cells(Path(folder)), batch_tokens=64)
        assert engine.module.training
        engine.deepspeed.destroy()
        return rows


def test_an_engine_under_zero_3() -> None:
    (alone,) = run_distributed(rows_of_engine, 1, tiny_config())
    sharded = tiny_config(parallel__tensor=2, parallel__zero_stage=3)
    for rows in run_distributed(rows_of_engine, 4, sharded):
        check_equal(rows, alone)
    assert math.isfinite(alone[0].loss or math.nan)
