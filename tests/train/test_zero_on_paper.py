"""What ZeRO leaves each of 512 ranks of the optimizer's states: DeepSpeed itself, as one of them."""

from __future__ import annotations

import pytest
import torch.distributed as dist
from support.distributed import run_distributed
from support.fake_ranks import become_rank, model_on_paper, rank_of
from support.large_layouts import CONTEXT, TENSOR, WORLD, layout
from support.training import CPU, make_engine, tiny_config

from megazebra.checkpoint.fragments import owned_pieces
from megazebra.parallel.mesh import ParallelMesh
from megazebra.plan.flops import parameter_count
from megazebra.train.engine import start_deepspeed


def zero_shard(numels: list[int], stage: int, ranks: int) -> int:
    """Elements of an optimizer's group on each rank: stage 3 shards every weight, 1 and 2 all of them end to end."""
    return sum(-(-numel // ranks) for numel in numels) if stage == 3 else 2 * -(-sum(numels) // (2 * ranks))


def _groups(parameters: list[tuple[int, int]]) -> tuple[list[int], list[int]]:
    """Numbers of elements of matrices and of vectors, which decay apart."""
    return [numel for ndim, numel in parameters if ndim > 1], [numel for ndim, numel in parameters if ndim == 1]


def _zero_buffers(stage: int) -> tuple[list[tuple[int, int]], list[int]]:
    """Dimensions and elements of a small model's weights, and the sizes of what DeepSpeed gives its optimizer."""
    dist.destroy_process_group()
    become_rank(9, WORLD)
    start_deepspeed(CPU, timeout_s=60)
    engine = make_engine(
        tiny_config(parallel__tensor=4, parallel__context=CONTEXT, parallel__zero_stage=stage, train__precision="bf16",
                    train__global_batch_size=16)
    )  # fmt: skip
    shapes = [getattr(parameter, "ds_shape", parameter.shape) for parameter in engine.module.parameters()]
    buffers = {id(piece.buffer): piece.buffer for piece in owned_pieces(engine)}
    engine.deepspeed.destroy()
    return [(len(shape), shape.numel()) for shape in shapes], [buffer.numel() for buffer in buffers.values()]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_shards_optimizer_states_over_data_and_context_ranks(stage: int) -> None:
    """DeepSpeed itself, as one of 512 ranks; then the two large models by the same arithmetic."""
    ((parameters, buffers),) = run_distributed(_zero_buffers, 1, stage)
    assert sorted(buffers) == sorted(zero_shard(group, stage, WORLD // 4) for group in _groups(parameters))
    for size, tp in TENSOR.items():
        config = layout(size)
        with rank_of(WORLD, 9):
            model = model_on_paper(config, ParallelMesh.build(config.parallel))
        groups = _groups([(parameter.ndim, parameter.numel()) for parameter in model.parameters()])
        shards = sum(zero_shard(group, stage, WORLD // tp) for group in groups)
        # Norms are on every tensor-parallel rank, and nothing else is there twice.
        norms = (2 * config.model.num_layers + 1) * config.model.hidden_size
        assert shards * WORLD == parameter_count(config.model) + (tp - 1) * norms
