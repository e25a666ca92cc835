"""Context parallelism as a user starts it: what the first lines and metrics.jsonl say; lengths need not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.command_line import STEPS, arguments, finish, launch, losses, train_rows

# 2 ranks of 32 tokens, one of them padding; 4 heads of 8 and 2 key/value heads in fp32, 2 sequences; window 16.
LAYOUT = ["--parallel.context=2", "--data.seq_len=63", "--train.recompute=full"]
HALO_BYTES = 2 * 2 * 2 * 8 * 15 * 4
SWAP_BYTES = 2 * 32 * 8 * 4  # of one head


@pytest.fixture(scope="module")
def run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    run_dir = tmp_path_factory.mktemp("run")
    process = launch(29631, *arguments(corpus, run_dir, *LAYOUT))
    output = finish(process)
    assert process.returncode == 0, output
    return run_dir, output


def test_the_strategies_are_told(run: tuple[Path, str]) -> None:
    _, output = run
    assert "layout   dp 1 x cp 2 x tp 1, ZeRO 1" in output
    assert "context  2 ranks of 32 tokens; a layer receives, forward + backward:" in output
    assert "  1 global layer: ulysses 0.01 + 0.01 MB (not allgather" in output
    assert "  3 local 16 layers: halo 0.00 + 0.00 MB (not ulysses" in output


def test_every_step_counts_what_layers_received(run: tuple[Path, str]) -> None:
    rows = train_rows(run[0])
    assert len(rows) == STEPS
    for row in rows:
        # Two micro-batches. Rank 0 has no halo of its own; the gradients of what it lent come back.
        local, global_ = row["context"]["local.halo"], row["context"]["global.ulysses"]
        assert set(row["context"]) == {"local.halo", "global.ulysses"}
        assert local["bytes"] <= 2 * 3 * HALO_BYTES
        # Queries, keys and values in and outputs back: 2 + 1 + 1 and 2 heads, the same in backward.
        assert global_ == {"calls": 2 * 4, "bytes": 2 * 2 * 6 * SWAP_BYTES}
        assert row["halo_overlap"] is None or 0 <= row["halo_overlap"] <= 1
    # In some step a document goes on over the shards' border in some sequence of both micro-batches.
    assert max(row["context"]["local.halo"]["bytes"] for row in rows) == 2 * 3 * HALO_BYTES
    assert sum(row["loss"] for row in rows[-4:]) / 4 < rows[0]["loss"] - 0.1


@pytest.mark.slow
def test_it_is_the_run_of_one_rank(run: tuple[Path, str], corpus: Path, tmp_path: Path) -> None:
    process = launch(29632, *arguments(corpus, tmp_path, "--data.seq_len=63", "--train.micro_batch_size=4"), ranks=1)
    output = finish(process)
    assert process.returncode == 0, output
    # float32, by 16 steps of AdamW apart; other data or attention would be tenths away.
    assert dict(losses(run[0])) == pytest.approx(dict(losses(tmp_path)), abs=1e-3)
