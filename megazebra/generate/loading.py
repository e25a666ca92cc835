"""A model ready for inference, from whatever folder holds its weights. No DeepSpeed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from megazebra.attention.backend import resolve_backend
from megazebra.checkpoint.weights import ReadOnDemand, open_weights
from megazebra.config.schema import ParallelConfig
from megazebra.models.initialization import load_full_weights
from megazebra.models.runtime import ModelRuntime
from megazebra.models.zebra import ZebraModel
from megazebra.parallel.mesh import ParallelMesh
from megazebra.pattern import AttentionSpec


def load_model(
    path: str | Path,
    device: torch.device | str,
    dtype: torch.dtype,
    attention_backend: str = "auto",
    mesh: ParallelMesh | None = None,
    *,
    specs: Sequence[AttentionSpec] | None = None,
    sequence_parallel: bool = False,
) -> ZebraModel:
    """The model at `path` (a run, one of its training checkpoints, a model folder), its weights in `dtype` on `device`.

    mesh: every rank of its tp group calls this and gets its shards; None: one rank has all. Host memory holds no more
    than the largest weight beside. specs: one per layer with its strategy of context parallelism, where the mesh has
    any. sequence_parallel: as in ModelRuntime.

    Raises CheckpointError when there is no model, or a file is damaged; ValueError when heads or widths are not
    divisible by the tensor-parallel size, or the attention backend asked for cannot serve this model here.
    """
    weights, device = open_weights(path), torch.device(device)
    config = weights.model
    mesh = mesh or ParallelMesh.build(ParallelConfig())
    backend = resolve_backend(
        attention_backend, config.attention_specs(), head_dim=config.head_size, dtype=dtype, device=device
    )
    with device, _new_parameters_in(dtype):
        model = ZebraModel(config, mesh, ModelRuntime(backend, sequence_parallel=sequence_parallel), specs)
    load_full_weights(model, ReadOnDemand(weights), mesh.tp)
    return model.eval().requires_grad_(False)


@contextmanager
def _new_parameters_in(dtype: torch.dtype) -> Iterator[None]:
    """Made in another dtype and converted, weights would be there twice."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
