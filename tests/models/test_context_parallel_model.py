"""The whole model on context-parallel ranks, with tensor parallelism or without: one rank's numbers; its traffic."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.distributed import run_distributed
from torch import Tensor
from zebras import make_model, random_tokens, small_config

from megazebra.attention.packing import Packing
from megazebra.config import ModelConfig, ParallelConfig, RopeConfig
from megazebra.context.traffic import Shape, received
from megazebra.parallel.collectives import all_reduce
from megazebra.parallel.mesh import ParallelMesh
from megazebra.parallel.sharding import unshard
from megazebra.pattern import AttentionSpec

BATCH, LENGTH = 2, 24
DOCUMENTS = {"whole": None, "packed": [[5, 9, 10], [13, 11]]}
# float64 (unit roundoff 1.1e-16), some thousand operations deep, in another order: relative to the largest.
RELATIVE = 1e-12
VARIANTS: dict[str, dict[str, Any]] = {
    "GLLL": {},
    "LLLL": {"pattern": "LLLL"},
    "LLLG": {"pattern": "LLLG", "num_kv_heads": None},
    "GGGG": {"pattern": "GGGG"},
    "wide": {"pattern": ["L", 13, 24, 100]},  # as long as a shard, as all of them, and more
    "everything": {
        "qk_norm": True,
        "attention_bias": True,
        "mlp_bias": True,
        "attention_sinks": "all",
        "attention_softcap": 2.0,
        "final_logit_softcap": 3.0,
        "tie_word_embeddings": True,
        "rope_global": RopeConfig(enabled=False),
        "rope_local": RopeConfig(theta=500.0),
    },
}


def specs_of(config: ModelConfig, local: str, global_: str) -> tuple[AttentionSpec, ...]:
    specs = config.attention_specs()
    return tuple(replace(spec, context=local if spec.is_local else global_) for spec in specs)


def part(x: Tensor, mesh: ParallelMesh) -> Tensor:
    return x.chunk(mesh.cp.size, dim=1)[mesh.cp.rank]


def loss_and_gradients(model: Any, mesh: ParallelMesh, loss: Tensor) -> dict[str, Tensor]:
    loss.backward()
    gradients = {
        name: unshard(all_reduce(parameter.grad, mesh.cp), parameter, mesh.tp)
        for name, parameter in model.named_parameters()
    }
    return {"loss": all_reduce(loss.detach().clone(), mesh.cp), **gradients}


def compare_with_one_rank(cp: int, tp: int) -> None:
    many, one = ParallelMesh.build(ParallelConfig(context=cp, tensor=tp)), ParallelMesh.build(ParallelConfig())
    for name, changes in VARIANTS.items():
        config = small_config(**changes)
        tokens, labels = random_tokens(config, BATCH, LENGTH)
        for documents, recompute, sequence_parallel in (
            ("whole", "none", False),
            ("packed", "none", tp > 1),
            ("packed", "full", tp > 1),
            ("whole", "selective", False),
        ):
            lengths = DOCUMENTS[documents]
            packing = Packing.from_document_lengths(lengths) if lengths else None
            plain = make_model(config, one, dtype=torch.float64)
            expected = loss_and_gradients(plain, one, plain(tokens, labels, None, packing))
            swaps = "allgather" if config.num_attention_heads // tp % cp else "ulysses"
            for local, global_ in (("halo", swaps), ("allgather", "allgather")):
                model = make_model(
                    config, many, specs_of(config, local, global_), dtype=torch.float64, recompute=recompute,
                    sequence_parallel=sequence_parallel,
                )  # fmt: skip
                loss = model(part(tokens, many), part(labels, many), None, packing)
                for what, own in loss_and_gradients(model, many, loss).items():
                    worst = (own - expected[what]).abs().max().item() / expected[what].abs().max().item()
                    assert worst <= RELATIVE, (name, documents, recompute, local, global_, what, worst)


@pytest.mark.parametrize(("cp", "tp"), [(2, 1), (3, 1), (2, 2), pytest.param(4, 1, marks=pytest.mark.slow)])
def test_context_ranks_equal_one(cp: int, tp: int) -> None:
    run_distributed(compare_with_one_rank, cp * tp, cp, tp)


def counted(cp: int, tp: int) -> dict[tuple[str, str, str], list[dict[str, tuple[int, int]]]]:
    """By case: what a forward and what its backward makes this rank receive, as calls and bytes by label."""
    mesh = ParallelMesh.build(ParallelConfig(context=cp, tensor=tp))
    results = {}
    config = small_config()
    tokens, labels = random_tokens(config, BATCH, LENGTH)
    for recompute in ("none", "full"):
        for local, global_ in (("halo", "ulysses"), ("ulysses", "allgather"), ("allgather", "allgather")):
            model = make_model(config, mesh, specs_of(config, local, global_), recompute=recompute)
            steps = []
            mesh.traffic.reset()
            loss = model(part(tokens, mesh), part(labels, mesh))
            for run in (lambda: None, loss.backward):
                run()
                sums: Counter[str] = Counter()
                for (group, _, label), tally in mesh.traffic.tallies.items():
                    if group == "cp":
                        sums[label] += tally.bytes
                steps.append(dict(sums))
                mesh.traffic.reset()
            results[recompute, local, global_] = steps
    return results


def test_a_layer_receives_what_the_formulas_say_and_recomputation_nothing_more() -> None:
    for cp, tp in ((2, 1), (4, 1), (2, 2)):
        for number, results in enumerate(run_distributed(counted, cp * tp, cp, tp)):
            for (recompute, local, global_), (forward, backward) in results.items():
                config = small_config()
                shape = Shape(BATCH, LENGTH, config.num_attention_heads // tp, config.kv_heads // tp,
                              config.head_size, cp, 4)  # fmt: skip
                for i, spec in enumerate(specs_of(config, local, global_)):
                    expected = received(spec.context, spec, shape, number // tp)
                    label = f"layers.{i}.self_attn.{spec.kind}.{spec.context}"
                    assert (forward.get(label, 0), backward.get(label, 0)) == (expected.forward, expected.backward), (
                        cp, tp, number, recompute, label,
                    )  # fmt: skip


def test_the_formula_of_the_halo_knows_no_length() -> None:
    """2 G D (w - 1) elements each way in the middle of the sequence, from 4k to 64k tokens, and for any ranks."""
    config = small_config(window=512)
    local = config.attention_specs()[1]
    for seq_len in (4096, 16384, 65536):
        for ranks in (4, 8):
            shape = Shape(1, seq_len, 4, 2, 8, ranks, 2)
            for rank in range(1, ranks - 1):
                both = received("halo", local, shape, rank)
                assert both.forward == both.backward == 2 * 2 * 8 * 511 * 2
            assert received("halo", local, shape, 0).forward == received("halo", local, shape, ranks - 1).backward == 0
