"""Nodes with disks of their own: every rank has to read the same data."""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist
from support.distributed import run_distributed

from megazebra.config.schema import Config
from megazebra.data.corpus.corpus_writer import CorpusWriter
from megazebra.data.sources import open_training_data, open_validation_data
from megazebra.parallel.mesh import ParallelMesh
from megazebra.train.session import check_same_everywhere


def compare_data(folders: list[Path]) -> str:
    """What this rank is told when it reads its own folder."""
    folder = folders[dist.get_rank()]
    data = {"path": str(folder / "train"), "validation_path": str(folder / "validation"), "seq_len": 4}
    config = Config.model_validate({"model": {"vocab_size": 100}, "data": data})
    mesh = ParallelMesh.build(config.parallel)
    try:
        check_same_everywhere(mesh, open_training_data(config), open_validation_data(config))
    except ValueError as error:
        return str(error)
    return "equal"


def write_node(folder: Path, *, train: int, validation: int) -> Path:
    for name, token in (("train", train), ("validation", validation)):
        with CorpusWriter(folder / name, vocab_size=100) as writer:
            writer.add_document([token] * 20)
    return folder


def test_copies_on_every_node_have_to_be_equal(tmp_path: Path) -> None:
    same = [write_node(tmp_path / name, train=1, validation=2) for name in ("node0", "node1")]
    assert run_distributed(compare_data, 2, same) == ["equal", "equal"]
    train = write_node(tmp_path / "train", train=3, validation=2)
    held_out = write_node(tmp_path / "held_out", train=1, validation=3)
    expected = "ranks 0 and 1 read different data (corpus); copy the same files to every node"
    assert run_distributed(compare_data, 2, [same[0], train]) == [expected, expected]
    expected = "ranks 0 and 1 read different data (held out); copy the same files to every node"
    assert run_distributed(compare_data, 2, [same[0], held_out]) == [expected, expected]
