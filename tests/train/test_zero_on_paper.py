"""What ZeRO leaves on each of 512 ranks: DeepSpeed's own answer for a small model, and 7B and 70B by arithmetic."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from support.distributed import run_distributed
from support.fake_ranks import become_rank, model_on_paper, rank_of
from support.large_layouts import CONTEXT, TENSOR, WORLD, layout
from support.training import CPU, make_engine, tiny_config

from megazebra.checkpoint.fragments import owned_pieces
from megazebra.parallel.mesh import ParallelMesh
from megazebra.plan.flops import parameter_count
from megazebra.train.engine import start_deepspeed

STAGES = (1, 2, 3)


class Held(NamedTuple):
    """Elements on a rank: of the weights, and of each of the optimizer's two groups (master weights; each moment
    is as large again).
    """

    weights: int
    matrices: int
    vectors: int


def share(shapes: list[torch.Size], stage: int, ranks: int) -> Held:
    """Stage 3 shards every weight, padded; stages 1 and 2 a group's weights end to end, in pairs of elements."""

    def sharded(ndim: int) -> int:
        numels = [shape.numel() for shape in shapes if len(shape) == ndim]
        return sum(-(-numel // ranks) for numel in numels) if stage == 3 else 2 * -(-sum(numels) // (2 * ranks))

    matrices, vectors = sharded(2), sharded(1)
    return Held(matrices + vectors if stage == 3 else sum(shape.numel() for shape in shapes), matrices, vectors)


def _under_deepspeed(context: int) -> list[tuple[list[torch.Size], Held]]:
    """Shapes of a small model's weights, and what rank 9 holds of them, by stage."""
    dist.destroy_process_group()
    become_rank(9, WORLD)
    start_deepspeed(CPU, timeout_s=60)
    found = []
    for stage in STAGES:
        engine = make_engine(
            tiny_config(parallel__tensor=4, parallel__context=context, parallel__zero_stage=stage,
                        train__precision="bf16", train__global_batch_size=WORLD // 4 // context)
        )  # fmt: skip
        # Under stage 3 the parameters themselves are empty.
        shapes = {name: getattr(p, "ds_shape", p.shape) for name, p in engine.module.named_parameters()}
        weights = sum(getattr(p, "ds_tensor", p).numel() for p in engine.module.parameters())
        buffers = {len(shapes[piece.name]): piece.buffer.numel() for piece in owned_pieces(engine)}
        found.append((list(shapes.values()), Held(weights, matrices=buffers[2], vectors=buffers[1])))
        engine.deepspeed.destroy()
    return found


def test_a_rank_holds_its_share_over_data_and_context_ranks() -> None:
    (found,) = run_distributed(_under_deepspeed, 1, CONTEXT)
    for stage, (shapes, held) in zip(STAGES, found, strict=True):
        assert held == share(shapes, stage, WORLD // 4), stage


def test_shares_of_all_ranks_make_the_large_models() -> None:
    for size, tp in TENSOR.items():
        config = layout(size)
        with rank_of(WORLD, 9):
            model = model_on_paper(config, ParallelMesh.build(config.parallel))
        # Norms are on every tensor-parallel rank, nothing else is there twice, and these sizes need no padding.
        norms = (2 * config.model.num_layers + 1) * config.model.hidden_size
        whole = parameter_count(config.model) + (tp - 1) * norms
        for stage in STAGES:
            held = share([parameter.shape for parameter in model.parameters()], stage, WORLD // tp)
            assert (held.matrices + held.vectors) * WORLD == whole
            assert held.weights * (WORLD if stage == 3 else tp) == whole
