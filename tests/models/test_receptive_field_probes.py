"""The receptive-field test finds nothing where all is well, under every strategy, and every fault that it is for."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from support.distributed import run_distributed
from support.training import tiny_config
from torch import Tensor

from megazebra.attention.packing import Packing
from megazebra.attention.reference import visible
from megazebra.config import RopeConfig
from megazebra.config.schema import Config
from megazebra.context import allgather, halo
from megazebra.context.choice import resolve_specs
from megazebra.models import build
from megazebra.models.build import model_runtime
from megazebra.models.receptive_field.report import examine
from megazebra.models.receptive_field.scenes import MAX_PROBES, Place, scenes
from megazebra.models.runtime import ModelRuntime
from megazebra.parallel.collectives import enter_tensor_parallel
from megazebra.parallel.mesh import ParallelMesh

CPU = torch.device("cpu")
WELL = "every query sees exactly the keys that it should, in outputs and in gradients"


def config_of(cp: int, tp: int, **changes: Any) -> Config:
    """Shards of 12 tokens (with 4 ranks); the window reaches over one of them and into the next."""
    settings = {
        "model__num_attention_heads": 12,
        "model__num_kv_heads": 4,
        "model__head_dim": 32,
        "model__window": 14,
        "data__seq_len": 48,
        "train__attention_backend": "blocked",
        "parallel__context": cp,
        "parallel__tensor": tp,
    }
    return tiny_config(**settings | changes)


def report(config: Config, runtime: ModelRuntime | None = None) -> list[str]:
    """What the examination says; the verdict must agree with it."""
    mesh = ParallelMesh.build(config.parallel)
    lines: list[str] = []
    healthy = examine(config, mesh, runtime or model_runtime(config, CPU), CPU, lines.append)
    assert healthy == (lines[-1] == WELL)
    return lines


STRATEGIES = (("halo", "ulysses"), ("ulysses", "allgather"), ("allgather", "allgather"))
KERNELS = (("blocked", "fp32"), ("simd", "fp32"), ("simd", "bf16"))
BATCHES = ((1, True), (2, True), (2, False))  # rows, documents masked


def healthy_configs(cp: int, tp: int) -> list[Config]:
    """Every strategy, every kernel and every kind of batch, in another combination for every layout."""
    configs = []
    for number, (local, global_) in enumerate(STRATEGIES):
        backend, precision = KERNELS[(number + cp + tp) % len(KERNELS)]
        rows, masked = BATCHES[(number + cp) % len(BATCHES)]
        chosen = {"parallel__context_local": local, "parallel__context_global": global_} if cp > 1 else {}
        configs.append(
            config_of(
                cp, tp, **chosen, parallel__sequence_parallel=tp > 1, train__attention_backend=backend,
                train__precision=precision, train__micro_batch_size=rows, data__document_mask=masked,
            )
        )  # fmt: skip
    return configs


def special_configs() -> list[Config]:
    special: list[dict[str, Any]] = [
        {"data__seq_len": 47, "model__pattern": (1, 5, "G", 100)},  # padded inside
        {"data__seq_len": 47, "data__document_mask": False, "train__recompute": "full"},
        {"model__qk_norm": True, "model__attention_sinks": "all", "model__attention_softcap": 2.0,
         "model__attention_bias": True, "model__rope_global": RopeConfig(enabled=False)},
    ]  # fmt: skip
    return [config_of(2, 1, **changes) for changes in special]


def reports(configs: list[Config]) -> list[list[str]]:
    return [report(config) for config in configs]


@pytest.mark.parametrize(("cp", "tp"), [(1, 1), (2, 1), (4, 1), (2, 2)])
def test_nothing_is_found_where_all_is_well(cp: int, tp: int) -> None:
    configs = healthy_configs(cp, tp) + (special_configs() if (cp, tp) == (2, 1) else [])
    for of_rank in run_distributed(reports, cp * tp, configs):
        for lines, config in zip(of_rank, configs, strict=True):
            assert lines[-1] == WELL, (config, lines)
            assert len([line for line in lines if line.endswith("ok")]) == len(set(resolve_specs(config))) + 2
            assert lines[0].startswith(f"layout   dp 1 x cp {cp} x tp {tp}, ")


def other_window(by: int | None) -> Callable[..., Tensor]:
    """None: no window at all."""

    def attend(honest: Any, q: Tensor, k: Tensor, v: Tensor, spec: Any, packing: Any, **more: Any) -> Tensor:
        window = None if by is None or spec.window is None else spec.window + by
        return honest(q, k, v, spec=replace(spec, window=window), packing=packing, **more)

    return attend


def without_packing(honest: Any, q: Tensor, k: Tensor, v: Tensor, spec: Any, packing: Any, **more: Any) -> Tensor:
    return honest(q, k, v, spec=spec, packing=None, **more)


def one_head_short(honest: Any, q: Tensor, k: Tensor, v: Tensor, spec: Any, packing: Any, **more: Any) -> Tensor:
    short = other_window(-1)(honest, q, k, v, spec, packing, **more)
    return torch.cat([short[:, :, :1], honest(q, k, v, spec=spec, packing=packing, **more)[:, :, 1:]], dim=2)


def neighbours_keys(honest: Any, q: Tensor, k: Tensor, v: Tensor, spec: Any, packing: Any, **more: Any) -> Tensor:
    """The values are right: what should not be seen shows in weights only."""
    return honest(q, k + k.roll(1, dims=1), v, spec=spec, packing=packing, **more)


def rows_mixed(honest: Any, q: Tensor, k: Tensor, v: Tensor, spec: Any, packing: Any, **more: Any) -> Tensor:
    return honest(q, k, v + v.flip(0), spec=spec, packing=packing, **more)


def aligned_at_the_end(q: Tensor, k: Tensor, v: Tensor, *, spec: Any, backend: Any, group: Any, **more: Any) -> Tensor:
    """A strategy where every rank has all keys, and takes its queries for the last ones of the sequence."""
    k, v = (enter_tensor_parallel(x, group, sequence_parallel=True) for x in (k, v))
    return backend.attend(q, k, v, spec=spec, packing=None)


HONEST_REACH, HONEST_TAKE = halo._reach, halo._Trip.take_gradients


def one_key_short(*arguments: Any) -> int:
    return max(0, HONEST_REACH(*arguments) - 1)


def gradients_lost(trip: Any) -> list[Tensor]:
    HONEST_TAKE(trip)
    return []


def first_two_swapped(config: Config) -> tuple[Any, ...]:
    first, second, *rest = resolve_specs(config)
    return second, first, *rest


NO_PACKING = SimpleNamespace(from_document_lengths=lambda rows, device: None)
ROW_0_FOR_ALL = SimpleNamespace(
    from_document_lengths=lambda rows, device: Packing.from_document_lengths([rows[0]] * len(rows), device)
)


@dataclass(frozen=True)
class Fault:
    """A kernel's `attend` or something else replaced, what has to be said then, and which tests have to stay silent.

    replaced: object, attribute, replacement.
    """

    said: tuple[str, ...]
    kernel: Callable[..., Tensor] | None = None
    replaced: tuple[Any, str, Any] | None = None
    silent: tuple[str, ...] = ()
    changes: dict[str, Any] = field(default_factory=dict)


# 24 tokens a rank: with a window of 14, query 36 is the last that sees the left rank's last token, query 24 sees 13 of
# its tokens.
FAULTS = {
    "a kernel ignores the window": Fault(
        (r"LEAK: query \d+ sees token \d+, which is \d+ away \(window 14\) \(local 14, outputs",
         r"LEAK: query \d+ sees token \d+, which is \d+ away \(window 14\) \(local 14, gradients",
         r"LEAK: query \d+ sees token \d+, which is \d+ away \(window 14\) \(layer 1 in the model"),
        other_window(None), silent=("global,", "layer 0", "document")
    ),
    "a kernel's window is one too long": Fault(
        (r"LEAK: query 37 sees token 23, which is 14 away \(window 14\) \(local 14, outputs", r"gradients"),
        other_window(1), silent=("LOST", "global", "layer 0"),
        changes={"parallel__context_local": "allgather"},
    ),
    "a kernel's window is one too short": Fault(
        (r"LOST: query \d+ does not see token \d+ in its window of 14 \(local 14, outputs", r"local 14, gradients"),
        other_window(-1), silent=("LEAK", "global", "layer 0")
    ),
    "one head's window is too short": Fault(
        (r"\(local 14, outputs, in 1 of 12 heads", ), one_head_short, silent=("LEAK", "global", "layer 0"),
    ),
    "a kernel ignores documents": Fault(
        (r"LEAK: query \d+ sees token \d+ of another document \(global, outputs",
         r"of another document \(global, gradients", r"of another document \(local 14, outputs",
         r"of another document \(local 14, gradients", r"of another document \(layer 3 in the model"),
        without_packing, silent=("LOST",),
    ),
    "a kernel mixes the rows of a batch": Fault(
        (r"LEAK: query \d+ of row 1 sees token \d+ of row 0 \(", "outputs", "gradients"), rows_mixed, silent=("LOST",),
        changes={"train__micro_batch_size": 2},
    ),
    "a kernel weighs by other keys": Fault(
        (r"LEAK: .* away \(window 14\) \(local 14, gradients",), neighbours_keys, silent=("outputs", "hidden states"),
    ),
    "the halo is one key short": Fault(
        (r"LOST: query 24 does not see token 11 in its window of 14 \(local 14, outputs",
         r"LOST: query 24 does not see token 11 in its window of 14 \(local 14, gradients"),
        replaced=(halo, "_reach", one_key_short), silent=("LEAK", "global"),
    ),
    "the halo's gradients don't come back": Fault(
        (r"LOST: query 24 does not see token \d+ in its window of 14 \(local 14, gradients",),
        replaced=(halo._Trip, "take_gradients", gradients_lost), silent=("LEAK", "global", "outputs", "hidden states"),
    ),
    "a strategy leaks the future": Fault(
        (r"LEAK: query \d+ sees token \d+, which comes after it \(global, outputs", r"comes after it \(global, grad",
         r"comes after it \(layer 0 in the model"),
        replaced=(allgather, "attend", aligned_at_the_end), silent=("local 14",),
    ),
    "a layer has another layer's spec": Fault(
        (r"WRONG: layer 0, 'G' in model.pattern, has the attention of a local 14 one, not global",
         r"WRONG: layer 1, 'L' in model.pattern, has the RoPE table of a global one, not local 14",
         r"LOST: query \d+ does not see token \d+ of its document \(layer 0 in the model, hidden states",
         r"LEAK: query \d+ sees token \d+, which is \d+ away \(window 14\) \(layer 1 in the model, hidden states"),
        replaced=(build, "resolve_specs", first_two_swapped), silent=("outputs", "gradients", "layer 2"),
    ),
    "the model drops the documents": Fault(
        (r"LEAK: query \d+ sees token \d+ of another document \(layer 0 in the model",
         r"LEAK: query \d+ sees token \d+ of another document \(4 layers together"),
        replaced=(build, "Packing", NO_PACKING), silent=("outputs", "gradients"),
    ),
    "the model takes the first row's documents for all": Fault(
        (r"document \(layer 0 in the model, hidden states", r"document \(layer 3 in the model, hidden states"),
        replaced=(build, "Packing", ROW_0_FOR_ALL), silent=("outputs", "gradients"),
        changes={"train__micro_batch_size": 2},
    ),
}  # fmt: skip


def faulty_reports() -> dict[str, list[str]]:
    found = {}
    for name, fault in FAULTS.items():
        config = config_of(2, 1, parallel__context_global="allgather", **fault.changes)
        runtime = model_runtime(config, CPU)
        if fault.kernel is not None:
            attend = partial(_call, fault.kernel, runtime.backend.attend)
            runtime = replace(runtime, backend=replace(runtime.backend, attend=attend))
        with patch.object(*fault.replaced) if fault.replaced else nullcontext():
            found[name] = report(config, runtime)
    return found


def _call(kernel: Any, honest: Any, q: Tensor, k: Tensor, v: Tensor, *, spec: Any, packing: Any, **more: Any) -> Tensor:
    return kernel(honest, q, k, v, spec, packing, **more)


def test_every_fault_is_named() -> None:
    first, second = run_distributed(faulty_reports, 2)
    assert first == second  # what one rank finds, all say
    for name, fault in FAULTS.items():
        sentences = [line for line in first[name] if line.startswith(("LEAK", "LOST", "WRONG"))]
        for pattern in fault.said:
            assert any(re.search(pattern, sentence) for sentence in sentences), (name, pattern, first[name])
        for words in fault.silent:
            assert not any(words in sentence for sentence in sentences), (name, words, first[name])


@pytest.mark.parametrize("window", [None, 1, 5, 100])
def test_what_should_be_seen_is_what_the_reference_sees(window: int | None) -> None:
    for scene in scenes(rows=2, seq_len=24, unpadded=22, ranks=4, window=window, masked=True):
        documents = scene.documents
        seen = visible(24, 24, window, Packing.from_document_lengths(documents.lengths), CPU)
        for row, position in product(range(2), range(24)):
            for mine, expected in (
                (documents.readers(Place(row, position), window), seen[row, :, position]),
                (documents.keys(Place(row, position), window), seen[row, position]),
            ):
                assert not mine[1 - row].any()
                assert np.array_equal(mine[row], expected.numpy())


def test_probes_stand_at_boundaries_and_are_bounded() -> None:
    for ranks, rows, window in product((1, 2, 3, 8), (1, 2, 3), (None, 1, 6, 500)):
        stages = scenes(rows=rows, seq_len=48, unpadded=48, ranks=ranks, window=window, masked=True)
        probes = [place.position for scene in stages for place in scene.tokens]
        assert len(probes) <= MAX_PROBES
        assert sum(len(scene.queries) for scene in stages) <= MAX_PROBES
        lengths = [row for scene in stages for row in scene.documents.lengths]
        assert all(sum(row) == 48 for row in lengths)
        if ranks > 1:
            middle = 48 // ranks * (1 + (ranks - 1) // 2)
            assert {middle - 1, middle} <= set(probes)
            ends = [set(np.cumsum(row)) for row in lengths]
            assert {offset for offset in (-1, 0, 1) if any(middle + offset in row for row in ends)} == {-1, 0, 1}
            assert any(1 in row for row in lengths)
    (whole,) = scenes(rows=1, seq_len=48, unpadded=45, ranks=2, window=5, masked=False)
    assert whole.documents.lengths == ((48,),)
