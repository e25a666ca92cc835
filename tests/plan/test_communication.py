"""The planner's bytes are those that a real step counts, to the byte, for every group and layer."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest
from support.distributed import run_distributed
from support.training import CPU, run_steps, tiny_config

from megazebra.config.schema import Config
from megazebra.models.build import build_model, forward, model_runtime
from megazebra.parallel.mesh import ParallelMesh
from megazebra.parallel.traffic import TrafficCounter
from megazebra.plan.communication import step_traffic
from megazebra.plan.zero_gathers import ZeroSettings
from megazebra.train.deepspeed_config import deepspeed_config
from megazebra.train.engine import TrainEngine, start_deepspeed

Tallies = dict[tuple[str, str, str], tuple[int, int]]

WHOLE = {"data__document_mask": False}  # documents would make halos smaller
EVERYTHING = {
    "model__qk_norm": True,
    "model__attention_bias": True,
    "model__mlp_bias": True,
    "model__attention_sinks": "all",
    "model__tie_word_embeddings": True,
}
SMALL_ZERO = ZeroSettings(persistence_threshold=1000, prefetch_bucket=5000, max_live=30000, max_reuse_distance=40000)

ON_TWO: dict[str, dict[str, Any]] = {
    **{f"zero {stage}": {"parallel__zero_stage": stage} for stage in range(4)},
    **{f"zero {stage}, bf16": {"parallel__zero_stage": stage, "train__precision": "bf16"} for stage in range(1, 4)},
    "no accumulation": {"parallel__zero_stage": 2, "train__global_batch_size": 2},
    "tp": {"parallel__tensor": 2},
    "tp, selective": {"parallel__tensor": 2, "train__recompute": "selective"},
    "tp, full": {"parallel__tensor": 2, "train__recompute": "full"},
    "sp": {"parallel__tensor": 2, "parallel__sequence_parallel": True},
    "sp, selective": {"parallel__tensor": 2, "parallel__sequence_parallel": True, "train__recompute": "selective"},
    "sp, full": {"parallel__tensor": 2, "parallel__sequence_parallel": True, "train__recompute": "full"},
    "sp, everything": {"parallel__tensor": 2, "parallel__sequence_parallel": True, **EVERYTHING},
    "tp, everything, bf16": {"parallel__tensor": 2, "train__precision": "bf16", **EVERYTHING},
    "cp": {"parallel__context": 2},
    "cp, full": {"parallel__context": 2, "train__recompute": "full", "parallel__zero_stage": 1},
    "cp, all gather": {
        "parallel__context": 2,
        "parallel__context_local": "allgather",
        "parallel__context_global": "allgather",
    },
    "cp, padded": {"parallel__context": 2, "data__seq_len": 31, "train__precision": "bf16"},
}
ON_FOUR: dict[str, dict[str, Any]] = {
    "tp x dp, zero 1": {"parallel__tensor": 2, "parallel__zero_stage": 1},
    "tp x dp, zero 3, bf16": {
        "parallel__tensor": 2,
        "parallel__sequence_parallel": True,
        "parallel__zero_stage": 3,
        "train__precision": "bf16",
    },
    "tp x cp, zero 2": {"parallel__tensor": 2, "parallel__context": 2, "parallel__zero_stage": 2},
    "cp 4, window over shards": {"parallel__context": 4, "model__window": 20, "parallel__context_local": "halo"},
}
GATHERING: dict[str, dict[str, Any]] = {
    **{name: {"parallel__zero_stage": 3, "train__recompute": name} for name in ("none", "selective", "full")},
    "everything": {"parallel__zero_stage": 3, **EVERYTHING, "model__mlp_bias": False},
}


def _config(changes: dict[str, Any]) -> Config:
    return tiny_config(**WHOLE, **changes)


def _counted(cases: list[dict[str, Any]], zero: ZeroSettings) -> list[tuple[int, Tallies]]:
    """Of every case: this rank's place among the context-parallel ranks, and what a step counted."""
    start_deepspeed(CPU, timeout_s=120)
    results = []
    for changes in cases:
        config = _config(changes)
        mesh, runtime = ParallelMesh.build(config.parallel), model_runtime(config, CPU)
        settings = deepspeed_config(config, mesh.dp.size)
        if zero != ZeroSettings():
            settings["zero_optimization"] |= {
                "stage3_param_persistence_threshold": zero.persistence_threshold,
                "stage3_prefetch_bucket_size": zero.prefetch_bucket,
                "stage3_max_live_parameters": zero.max_live,
                "stage3_max_reuse_distance": zero.max_reuse_distance,
            }
        engine = TrainEngine(
            config, mesh, CPU, settings, lambda c=config, m=mesh, r=runtime: build_model(c, m, r), forward
        )
        warm_up = 2 if engine.zero_stage == 3 else 0  # it first watches the order of the modules
        run_steps(engine, config, range(warm_up))
        mesh.traffic.reset()
        run_steps(engine, config, range(warm_up, warm_up + 1))
        results.append((mesh.cp.rank, _tallies(mesh.traffic)))
        engine.deepspeed.destroy()
    return results


def _tallies(traffic: TrafficCounter) -> Tallies:
    return {key: (tally.calls, tally.bytes) for key, tally in traffic.tallies.items()}


def _apart(tallies: Tallies) -> tuple[Tallies, dict[str, int]]:
    """The tallies but those of context parallelism, and the bytes of these by label: their kinds are several there."""
    by_label: dict[str, int] = defaultdict(int)
    for (group, _, label), (_, received) in tallies.items():
        if group == "cp":
            by_label[label] += received
    return {key: value for key, value in tallies.items() if key[0] != "cp"}, dict(by_label)


@pytest.mark.parametrize(
    ("cases", "ranks", "zero"),
    [(ON_TWO, 2, ZeroSettings()), (ON_FOUR, 4, ZeroSettings()), (GATHERING, 2, SMALL_ZERO)],
    ids=["two-ranks", "four-ranks", "zero-3-gathers"],
)
def test_bytes_are_those_counted(cases: dict[str, dict[str, Any]], ranks: int, zero: ZeroSettings) -> None:
    for rank, counted in enumerate(run_distributed(_counted, ranks, list(cases.values()), zero)):
        for (name, changes), (cp_rank, tallies) in zip(cases.items(), counted, strict=True):
            predicted = _tallies(step_traffic(_config(changes), ranks, cp_rank, zero))
            del predicted["world", "all_reduce", "step_times"]  # the loop's, which doesn't run here
            assert _apart(predicted) == _apart(tallies), (name, rank)
