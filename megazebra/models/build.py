"""From a configuration to a model and its forward pass on a micro-batch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megazebra.attention.backend import resolve_backend
from megazebra.attention.packing import Packing
from megazebra.config.schema import Config
from megazebra.context.choice import resolve_specs
from megazebra.data.batch import MicroBatch
from megazebra.models import elementwise
from megazebra.models.runtime import Elementwise, ModelRuntime
from megazebra.models.zebra import ZebraModel
from megazebra.parallel.mesh import ParallelMesh


def model_runtime(config: Config, device: torch.device) -> ModelRuntime:
    """Attention kernels resolved for every layer, and the other run-time choices.

    Raises ValueError when the attention backend asked for cannot serve this model here, or torch.compile fails.
    """
    functions: Elementwise = elementwise
    if config.train.compile:
        from megazebra.models import fused  # brings torch's compiler, which takes seconds

        fused.check_compiler(device)
        functions = fused
    return ModelRuntime(
        backend=resolve_backend(
            config.train.attention_backend,
            config.model.attention_specs(),
            head_dim=config.model.head_size,
            dtype=torch.bfloat16 if config.train.precision == "bf16" else torch.float32,
            device=device,
        ),
        elementwise=functions,
        sequence_parallel=config.parallel.sequence_parallel and config.parallel.tensor > 1,
        recompute=config.train.recompute,
        loss_chunk=config.train.loss_chunk,
    )


def build_model(config: Config, mesh: ParallelMesh, runtime: ModelRuntime) -> ZebraModel:
    """The model of this rank, its weights not yet initialized.

    Raises ValueError when a context-parallel strategy asked for can't serve its layers.
    """
    return ZebraModel(config.model, mesh, runtime, resolve_specs(config))


def forward(module: nn.Module, batch: MicroBatch) -> Tensor:
    """Summed token loss of the batch; `module` is a ZebraModel or wraps one."""
    device = batch.tokens_BS.device
    packing = None
    if batch.document_lengths is not None and any(len(row) > 1 for row in batch.document_lengths):
        packing = Packing.from_document_lengths(batch.document_lengths, device)
    return module(batch.tokens_BS, batch.labels_BS, batch.positions_BS, packing, seq_len=batch.seq_len)
