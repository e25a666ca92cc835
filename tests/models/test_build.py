"""From a configuration to a model and the loss of a micro-batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megazebra.attention.packing import Packing
from megazebra.config import Config, ParallelConfig
from megazebra.data.batch import collate
from megazebra.data.index.boundaries import document_positions
from megazebra.data.samples import Sample
from megazebra.models.build import build_model, forward, model_runtime
from megazebra.models.initialization import initialize
from megazebra.parallel.mesh import ParallelMesh

CPU = torch.device("cpu")
MODEL = {
    "num_layers": 2,
    "hidden_size": 32,
    "ffn_hidden_size": 40,
    "num_attention_heads": 4,
    "vocab_size": 61,
    "pattern": "GL",
    "window": 5,
}


def _config(**sections: dict[str, object]) -> Config:
    return Config.model_validate({"model": MODEL, **sections})


def test_run_time_choices_come_from_the_configuration() -> None:
    runtime = model_runtime(
        _config(
            train={"attention_backend": "reference", "recompute": "full", "loss_chunk": 7},
            parallel={"tensor": 2, "sequence_parallel": True},
        ),
        CPU,
    )
    assert (runtime.backend.name, runtime.sequence_parallel, runtime.recompute, runtime.loss_chunk) == (
        "reference",
        True,
        "full",
        7,
    )
    assert not model_runtime(_config(parallel={"sequence_parallel": True}), CPU).sequence_parallel
    with pytest.raises(ValueError, match="no attention backend 'flsh'"):
        model_runtime(_config(train={"attention_backend": "flsh"}), CPU)


@pytest.mark.parametrize("document_mask", [True, False])
def test_the_loss_of_a_micro_batch(document_mask: bool) -> None:
    config = _config()
    mesh = ParallelMesh.build(ParallelConfig())
    model = build_model(config, mesh, model_runtime(config, CPU))
    initialize(model, config.model, 1, mesh.tp)
    rows = np.random.default_rng(0).integers(0, 61, (2, 25))
    tokens, labels = rows[:, :-1], rows[:, 1:]

    def sample(tokens: np.ndarray, labels: np.ndarray, lengths: list[int]) -> Sample:
        return Sample(tokens, labels, document_positions(lengths if document_mask else [24]), lengths, 0)

    samples = [sample(tokens[0], labels[0], [10, 14]), sample(tokens[1], labels[1], [24])]
    batch = collate(samples, document_mask=document_mask)
    packing = Packing.from_document_lengths([[10, 14], [24]]) if document_mask else None
    expected = model(batch.tokens_BS, batch.labels_BS, batch.positions_BS, packing)
    assert torch.equal(forward(model, batch), expected)
    # Rows of one document each need no packing.
    whole = collate([sample(tokens[i], labels[i], [24]) for i in range(2)], document_mask=document_mask)
    assert torch.equal(forward(model, whole), model(whole.tokens_BS, whole.labels_BS))
