"""The whole model on two tensor-parallel ranks: the same numbers as on one, and exactly the traffic it should cost."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from support.distributed import run_distributed
from zebras import make_model, random_tokens, random_weights, small_config

from megazebra.attention.packing import Packing
from megazebra.config import ModelConfig, ParallelConfig, RopeConfig
from megazebra.models.initialization import full_weights, load_full_weights
from megazebra.parallel.mesh import ParallelMesh
from megazebra.parallel.sharding import unshard

BATCH, LENGTH, CHUNK = 2, 24, 10
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "llama": {"pattern": "G", "num_kv_heads": None},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "qk_norm": {"qk_norm": True, "head_dim": 16},
    "sinks": {"attention_sinks": "all"},
    "local-sinks": {"attention_sinks": "local", "attention_bias": True},
    "softcaps": {"attention_softcap": 2.0, "final_logit_softcap": 3.0},
    "tied": {"tie_word_embeddings": True},
    "nope": {"rope_global": RopeConfig(enabled=False)},
    "two-ropes": {
        "rope_global": RopeConfig(scaling="yarn", factor=4.0, original_max_position_embeddings=32),
        "rope_local": RopeConfig(theta=500.0),
    },
    "list": {"pattern": ["G", 3, "L", 9]},
    "everything": {
        "qk_norm": True,
        "attention_bias": True,
        "mlp_bias": True,
        "attention_sinks": "all",
        "attention_softcap": 2.0,
        "final_logit_softcap": 3.0,
        "tie_word_embeddings": True,
    },
}
# float64 (unit roundoff 1.1e-16), some thousand operations deep, in another order: relative to the largest.
RELATIVE = 1e-12


def _close(own: torch.Tensor, expected: torch.Tensor, what: object) -> None:
    worst = (own - expected).abs().max().item() / expected.abs().max().item()
    assert worst <= RELATIVE, (what, worst)


def _equals_one_rank(name: str, two: ParallelMesh, one: ParallelMesh) -> None:
    config = small_config(**VARIANTS[name])
    tokens, labels = random_tokens(config, BATCH, LENGTH)
    packing = Packing.from_document_lengths([[5, 19], [24]])
    plain = make_model(config, one, dtype=torch.float64, loss_chunk=CHUNK)
    expected = plain(tokens, labels, None, packing)
    expected.backward()
    gradients = {name: parameter.grad for name, parameter in plain.named_parameters()}
    for sequence_parallel in (False, True):
        model = make_model(
            config,
            two,
            dtype=torch.float64,
            loss_chunk=CHUNK,
            sequence_parallel=sequence_parallel,
            # That recomputation changes no bit is tested without ranks; here it meets the collectives.
            recompute=("full" if sequence_parallel else "selective") if name == "everything" else "none",
        )
        loss = model(tokens, labels, None, packing)
        _close(loss, expected, name)
        loss.backward()
        for weight, parameter in model.named_parameters():
            _close(unshard(parameter.grad, parameter, two.tp), gradients[weight], (name, sequence_parallel, weight))
        with torch.no_grad():
            _close(model(tokens, None, None, packing), plain(tokens, None, None, packing), name)
            _close(model(tokens, labels, None, packing, "none"), plain(tokens, labels, None, packing, "none"), name)


def _all_variants() -> None:
    two, one = ParallelMesh.build(ParallelConfig(tensor=2)), ParallelMesh.build(ParallelConfig())
    for name in VARIANTS:
        _equals_one_rank(name, two, one)
    _weights_go_in_and_out_whole(two)


def _weights_go_in_and_out_whole(two: ParallelMesh) -> None:
    model = make_model(small_config(**VARIANTS["everything"]), two, dtype=torch.float64)
    weights = {name: weight + 1 for name, weight in random_weights(model).items()}
    load_full_weights(model, weights, two.tp)
    back = full_weights(model, two.tp)
    assert back.keys() == weights.keys()
    for name, weight in weights.items():
        assert torch.equal(back[name], weight), name


def test_two_ranks_equal_one() -> None:
    run_distributed(_all_variants, 2)


def _expected_traffic(config: ModelConfig, sequence_parallel: bool, recompute: str) -> Counter[tuple[str, str, int]]:
    """Calls of one forward and backward by (label, kind, bytes of the whole tensor).

    Every block enters tensor parallelism twice (before attention and MLP) and leaves it twice (after o_proj and
    down_proj). Without sequence parallelism leaving costs an all-reduce in forward and entering one in
    backward: 4 in a block. With it, entering gathers and leaving reduce-scatters, and backward the other way
    round: 4 and 4 in a block, the same bytes, and the inputs kept as shards are gathered again; besides, norm
    weights and the biases after the sum are all-reduced.
    Selective recomputation repeats no collective. Full repeats a block's forward up to the input of down_proj: its
    two gathers, and the collective after o_proj.
    """
    residual = BATCH * LENGTH * config.hidden_size * 4
    forwards = 2 if recompute == "full" else 1  # of each block, up to the input of down_proj
    calls: Counter[tuple[str, str, int]] = Counter()

    def enter(label: str, forwards: int = 1) -> None:
        if sequence_parallel:
            again = label != "lm_head" and recompute != "full"  # in backward, for the weights' gradients
            calls[label, "all_gather", residual] += forwards + again
            calls[label, "reduce_scatter", residual] += 1
        else:
            calls[label, "all_reduce", residual] += 1

    def leave(label: str, forwards: int = 1) -> None:
        if sequence_parallel:
            calls[label, "reduce_scatter", residual] += forwards
            calls[label, "all_gather", residual] += 1
        else:
            calls[label, "all_reduce", residual] += forwards

    leave("embed_tokens")
    for i, spec in enumerate(config.attention_specs()):
        attention = f"layers.{i}.self_attn.{spec.kind}"
        enter(attention, forwards)
        leave(attention, forwards)
        enter(f"layers.{i}.mlp", forwards)
        leave(f"layers.{i}.mlp")
        if sequence_parallel and config.attention_bias:
            calls[attention, "all_reduce", config.hidden_size * 4] += 1
        if sequence_parallel and config.mlp_bias:
            calls[f"layers.{i}.mlp", "all_reduce", config.hidden_size * 4] += 1
        if sequence_parallel:
            calls["norm", "all_reduce", config.hidden_size * 4] += 2
        if config.qk_norm:  # each rank has some of the heads
            calls["norm", "all_reduce", config.head_size * 4] += 2
    if sequence_parallel:
        calls["norm", "all_reduce", config.hidden_size * 4] += 1
    enter("lm_head")
    tokens = BATCH * LENGTH
    for first in range(0, tokens, CHUNK):
        chunk = min(CHUNK, tokens - first)
        calls["loss", "all_reduce", chunk * 4] += 1  # maxima
        calls["loss", "all_reduce", 2 * chunk * 4] += 1  # sums of exponentials, logits of the labels
    return calls


TRAFFIC_VARIANTS = ["plain", "biases", "qk_norm", "everything"]


def _counted_traffic() -> dict[tuple[str, bool, str], tuple[dict[Any, tuple[int, int]], int]]:
    """Per case: calls and bytes by (label, kind) of a step, and the bytes of a forward without gradients."""
    mesh = ParallelMesh.build(ParallelConfig(tensor=2))
    counted = {}
    for name in TRAFFIC_VARIANTS:
        config = small_config(**VARIANTS[name])
        tokens, labels = random_tokens(config, BATCH, LENGTH)
        for sequence_parallel in (False, True):
            for recompute in ("none", "selective", "full"):
                options = {"sequence_parallel": sequence_parallel, "recompute": recompute, "loss_chunk": CHUNK}
                model = make_model(config, mesh, **options)
                mesh.traffic.reset()
                model(tokens, labels).backward()
                step = {(label, kind): (t.calls, t.bytes) for (_, kind, label), t in mesh.traffic.tallies.items()}
                assert {group for group, _, _ in mesh.traffic.tallies} == {"tp"}
                mesh.traffic.reset()
                with torch.no_grad():
                    model.model(tokens, torch.arange(LENGTH).expand_as(tokens), None, LENGTH)
                counted[name, sequence_parallel, recompute] = step, mesh.traffic.total_bytes
    return counted


def test_traffic_of_a_step() -> None:
    results = run_distributed(_counted_traffic, 2)
    assert results[0] == results[1]
    for (name, sequence_parallel, recompute), (step, forward_bytes) in results[0].items():
        config = small_config(**VARIANTS[name])
        expected: dict[tuple[str, str], tuple[int, int]] = {}
        for (label, kind, full_bytes), calls in _expected_traffic(config, sequence_parallel, recompute).items():
            before = expected.get((label, kind), (0, 0))
            # Each of two ranks receives half of a gathered or scattered tensor, and twice that in an all-reduce.
            received = full_bytes if kind == "all_reduce" else full_bytes // 2
            expected[label, kind] = before[0] + calls, before[1] + calls * received
        assert step == expected, (name, sequence_parallel, recompute)
        # Forward alone: the embedding and two sums of a block, each an all-reduce or a gather with a scatter.
        residual = BATCH * LENGTH * config.hidden_size * 4
        embedding = residual // 2 if sequence_parallel else residual
        assert forward_bytes == embedding + 2 * config.num_layers * residual


def _refusals() -> None:
    mesh = ParallelMesh.build(ParallelConfig(tensor=2))
    for key, changes in {
        "num_attention_heads": {"num_attention_heads": 3, "num_kv_heads": 1, "head_dim": 8},
        "num_kv_heads": {"num_kv_heads": 1},
        "ffn_hidden_size": {"ffn_hidden_size": 41},
    }.items():
        message = f"model.{key}={changes[key]} is not divisible by the tensor-parallel size 2"
        with pytest.raises(ValueError, match=message):
            make_model(small_config(**changes), mesh)


def test_sizes_that_do_not_divide_are_named() -> None:
    run_distributed(_refusals, 2)
