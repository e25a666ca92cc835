"""One sequence of samples whatever the layout: over process groups, micro-batches, run lengths and resumes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.distributed import run_distributed

from megazebra.config.schema import Config
from megazebra.data.corpus.corpus_writer import CorpusWriter
from megazebra.data.loader import StepLoader
from megazebra.data.sources import open_training_data
from megazebra.parallel.mesh import ParallelMesh
from megazebra.plan.flops import training_flops

SEQ_LEN, BATCH, STEPS = 16, 8, 5
Rows = dict[int, tuple[list[int], ...]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("elastic")
    random = np.random.default_rng(0)
    for name in ("a", "b"):
        with CorpusWriter(folder / name, vocab_size=100) as writer:
            writer.add_documents([random.integers(0, 100, random.integers(1, 40)) for _ in range(120)])
    return folder


def config_of(folder: Path, steps: int = STEPS, **changes: Any) -> Config:
    tree: dict[str, Any] = {
        "model": {"vocab_size": 100, "num_layers": 4, "window": 4, "hidden_size": 8, "num_attention_heads": 2},
        "data": {
            "seq_len": SEQ_LEN,
            "sources": {
                "a": {"path": str(folder / "a"), "weight": 0.7},
                "b": {"path": str(folder / "b"), "weight": 0.3, "min_document_tokens": 8},
            },
            "packing": changes.pop("packing", "concatenate"),
        },
        "train": {"steps": steps, "global_batch_size": BATCH, **changes.pop("train", {})},
        "parallel": changes,
    }
    return Config.model_validate(tree)


def this_ranks_steps(
    config: Config, first_step: int = 0
) -> list[tuple[int, int, list[tuple[int, list[int], list[int]]]]]:
    """(dp rank, cp rank, rows of index, tokens and labels on this rank) of every step."""
    mesh = ParallelMesh.build(config.parallel)
    loader = StepLoader(
        open_training_data(config),
        global_batch_size=BATCH,
        micro_batch_size=config.train.micro_batch_size,
        dp_rank=mesh.dp.rank,
        dp_size=mesh.dp.size,
        cost=lambda lengths: training_flops(config.model, lengths),
    )
    steps = []
    for step in range(first_step, config.train.steps):
        rows = []
        for batch in loader.next_step(step * BATCH):
            part = batch.context_slice(mesh.cp.rank, mesh.cp.size)
            rows += zip(part.sample_indices, part.tokens_BS.tolist(), part.labels_BS.tolist(), strict=True)
        steps.append((mesh.dp.rank, mesh.cp.rank, rows))
    return steps


def whole_steps(ranks: list[Any], dp: int, cp: int) -> list[Rows]:
    """The samples of every step put together from all ranks; tensor-parallel peers must hold the same."""
    steps: list[Rows] = []
    for shares in zip(*ranks, strict=True):
        parts: dict[tuple[int, int], Any] = {}
        for dp_rank, cp_rank, rows in shares:
            assert parts.setdefault((dp_rank, cp_rank), rows) == rows
        assert len(parts) == dp * cp
        step: Rows = {}
        for dp_rank in range(dp):
            for pieces in zip(*(parts[dp_rank, cp_rank] for cp_rank in range(cp)), strict=True):
                assert len({index for index, _, _ in pieces}) == 1
                assert pieces[0][0] not in step
                step[pieces[0][0]] = tuple(
                    [t for piece in pieces for t in piece[part]] for part in (1, 2)
                )  # tokens, labels
        steps.append(step)
    return steps


@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
def test_the_same_samples_under_every_layout(folder: Path, packing: str) -> None:
    expected = whole_steps([this_ranks_steps(config_of(folder, packing=packing))], 1, 1)
    assert [sorted(step) for step in expected] == [list(range(s * BATCH, (s + 1) * BATCH)) for s in range(STEPS)]
    for world, layout, micro in [
        (2, {}, 1),
        (2, {}, 4),
        (4, {}, 2),
        (2, {"tensor": 2}, 2),
        (4, {"tensor": 2}, 1),
        (4, {"context": 2}, 2),
        (4, {"context": 2, "tensor": 2}, 8),
    ]:
        config = config_of(folder, packing=packing, train={"micro_batch_size": micro}, **layout)
        ranks = run_distributed(this_ranks_steps, world, config)
        cp = layout.get("context", 1)
        assert whole_steps(ranks, world // layout.get("tensor", 1) // cp, cp) == expected


def test_a_resume_under_another_layout_goes_on_where_the_run_stood(folder: Path) -> None:
    expected = whole_steps([this_ranks_steps(config_of(folder))], 1, 1)
    before = run_distributed(this_ranks_steps, 2, config_of(folder, steps=2))
    after = run_distributed(this_ranks_steps, 4, config_of(folder), 2)
    assert whole_steps(before, 2, 1) + whole_steps(after, 4, 1) == expected


def test_a_lengthened_run_keeps_its_past(folder: Path) -> None:
    """Across several epochs of both sources."""
    short = whole_steps([this_ranks_steps(config_of(folder))], 1, 1)
    long = whole_steps([this_ranks_steps(config_of(folder, steps=100))], 1, 1)
    assert min(open_training_data(config_of(folder)).epochs(100 * BATCH).values()) > 1
    assert long[:STEPS] == short
