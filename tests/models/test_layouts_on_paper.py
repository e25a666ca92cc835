"""Layouts of 512 ranks on paper: Llama 2's 7B and 70B as Zebra models on 131,072 tokens, in one process.

The real model goes forward and backward through the real strategies, as some of the ranks (`support.fake_ranks`).
Names of sizes: n tokens of a context-parallel rank; E, F widths and H, G heads of a tensor-parallel rank, D head dim.
"""

from __future__ import annotations

from collections import defaultdict
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.fake_ranks import LiveBytes, model_on_paper, rank_of
from support.large_layouts import CONTEXT, SIZES, TENSOR, WORLD, layout, rank_at

from megazebra.config import Config, ParallelConfig
from megazebra.context.choice import layer_shape, resolve_specs
from megazebra.context.traffic import received
from megazebra.parallel.mesh import ParallelMesh
from megazebra.parallel.sharding import full_shape, is_sharded
from megazebra.plan.flops import parameter_count

AXES = ("tp", "cp", "dp", "dp_cp", "world")
BF16, FP32 = 2, 4
both_sizes = pytest.mark.parametrize("size", SIZES)

Tallies = dict[tuple[str, str, str], tuple[int, int]]


def tokens_of_a_rank(config: Config) -> torch.Tensor:
    return torch.empty(1, config.data.seq_len // CONTEXT, dtype=torch.int64, device="meta")


def counted(config: Config, rank: int) -> Tallies:
    """Calls and bytes of one forward and backward, by group, kind and label."""
    with rank_of(WORLD, rank):
        mesh = ParallelMesh.build(config.parallel)
        tokens = tokens_of_a_rank(config)
        model_on_paper(config, mesh)(tokens, tokens).backward()
    return {key: (tally.calls, tally.bytes) for key, tally in mesh.traffic.tallies.items()}


@both_sizes
def test_every_rank_is_in_one_group_of_every_axis(size: str) -> None:
    config = layout(size)
    tp, cp, dp = TENSOR[size], CONTEXT, WORLD // (TENSOR[size] * CONTEXT)
    groups = defaultdict(set)
    for rank in range(WORLD):
        with rank_of(WORLD, rank):
            mesh = ParallelMesh.build(config.parallel)
            reached = {axis: dist.get_process_group_ranks(getattr(mesh, axis).process_group) for axis in AXES}
        d, c, t = rank // (tp * cp), rank // tp % cp, rank % tp
        # tp fastest: its ranks are neighbours, and the left neighbour along the sequence is tp ranks away.
        expected = {
            "tp": (range(rank - t, rank - t + tp), t),
            "cp": (range(rank - c * tp, rank - c * tp + tp * cp, tp), c),
            "dp": (range(c * tp + t, WORLD, tp * cp), d),
            "dp_cp": (range(t, WORLD, tp), d * cp + c),
            "world": (range(WORLD), rank),
        }
        for axis, (members, place) in expected.items():
            group = getattr(mesh, axis)
            assert (group.ranks, group.rank, reached[axis]) == (tuple(members), place, list(members)), (axis, rank)
            groups[axis].add(group.ranks)
    for axis, count in {"tp": WORLD // tp, "cp": WORLD // cp, "dp": WORLD // dp, "dp_cp": tp, "world": 1}.items():
        assert len(groups[axis]) == count
        assert sorted(rank for members in groups[axis] for rank in members) == list(range(WORLD))


@both_sizes
def test_every_message_is_expected_where_it_goes(size: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What each rank of a context-parallel group sends to each other, that one receives, in the same order."""
    config = layout(size, layers=4)
    sent, arriving = defaultdict(list), defaultdict(list)  # by (kind, from, to): numbers of elements
    batch_isend_irecv, all_to_all_single = dist.batch_isend_irecv, dist.all_to_all_single

    def note_messages(operations: list[dist.P2POp]) -> Any:
        for each in operations:
            if each.op is dist.isend:
                sent["message", dist.get_rank(), each.peer].append(each.tensor.numel())
            else:
                arriving["message", each.peer, dist.get_rank()].append(each.tensor.numel())
        return batch_isend_irecv(operations)

    def note_all_to_all(incoming: Any, outgoing: Any, sizes_in: Any, sizes_out: Any, group: Any) -> Any:
        for peer, size_in, size_out in zip(dist.get_process_group_ranks(group), sizes_in, sizes_out, strict=True):
            sent["all_to_all", dist.get_rank(), peer].append(size_out)
            arriving["all_to_all", peer, dist.get_rank()].append(size_in)
        return all_to_all_single(incoming, outgoing, sizes_in, sizes_out, group=group)

    monkeypatch.setattr(dist, "batch_isend_irecv", note_messages)
    monkeypatch.setattr(dist, "all_to_all_single", note_all_to_all)
    ranks = [rank_at(config, 3, c, 1) for c in range(CONTEXT)]
    for rank in ranks:
        counted(config, rank)
    assert sent == arriving
    both_ways = {("message", *pair) for one in pairwise(ranks) for pair in (one, one[::-1])}
    assert sent.keys() == both_ways | {("all_to_all", a, b) for a in ranks for b in ranks}


@both_sizes
def test_shards_of_all_ranks_make_the_model(size: str) -> None:
    # As in Llama 2's published checkpoints; then with a token more, for which the vocabulary is padded.
    assert parameter_count(layout(size).model) == {"7B": 6_738_415_616, "70B": 68_976_648_192}[size]
    config = layout(size, vocab_size=32001)
    alone = config.model_copy(update={"parallel": ParallelConfig()})
    whole = model_on_paper(alone, ParallelMesh.build(alone.parallel))
    shapes = {name: parameter.shape for name, parameter in whole.named_parameters()}
    total = padding = 0
    for t in range(TENSOR[size]):
        with rank_of(WORLD, rank_at(config, 0, 0, t)):
            model = model_on_paper(config, ParallelMesh.build(config.parallel))
        assert {name: full_shape(p, p.shape) for name, p in model.named_parameters()} == shapes
        total += sum(p.numel() for p in model.parameters() if is_sharded(p) or t == 0)
        padding += model.lm_head.padding
    assert padding == TENSOR[size] - 1
    assert total - 2 * padding * config.model.hidden_size == parameter_count(config.model)


def expected_traffic(config: Config, c: int) -> Tallies:
    """Of context parallelism as `context.traffic` says, of tensor parallelism as Korthikanti et al. (2022) do."""
    tp, E, L = config.parallel.tensor, config.model.hidden_size, config.model.num_layers
    n, full = config.data.seq_len // CONTEXT, config.train.recompute == "full"
    residual, norm = n * E * BF16 * (tp - 1) // tp, 2 * E * BF16 * (tp - 1) // tp
    chunks = n // config.train.loss_chunk
    tallies = {
        ("tp", "reduce_scatter", "embed_tokens"): (1, residual),
        ("tp", "all_gather", "embed_tokens"): (1, residual),
        ("tp", "all_gather", "lm_head"): (1, residual),
        ("tp", "reduce_scatter", "lm_head"): (1, residual),
        ("tp", "all_reduce", "norm"): (2 * L + 1, (2 * L + 1) * norm),
        # For every token its largest logit, the sum of exponentials and the label's logit.
        ("tp", "all_reduce", "loss"): (2 * chunks, 2 * 3 * n * FP32 * (tp - 1) // tp),
    }
    for i, spec in enumerate(resolve_specs(config)):
        attention, mlp = f"layers.{i}.self_attn.{spec.kind}", f"layers.{i}.mlp"
        # Gathered in forward, for the output's gradient, and once more: for weights' gradients, or to recompute.
        for label in (attention, mlp):
            tallies["tp", "all_gather", label] = (3, 3 * residual)
            scatters = 3 if full and label == attention else 2
            tallies["tp", "reduce_scatter", label] = (scatters, scatters * residual)
        kind, calls = ("message", 2 - (c in (0, CONTEXT - 1))) if spec.context == "halo" else ("all_to_all", 4)
        bytes_ = received(spec.context, spec, layer_shape(config), c).total
        tallies["cp", kind, f"{attention}.{spec.context}"] = (calls, bytes_)
    return tallies


@both_sizes
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_bytes_of_a_step(size: str, recompute: str) -> None:
    """First, middle and last of a sequence's ranks, and of all; the middle one with all layers, as it would train."""
    layers_of_middle = None if recompute == "full" else 4
    for d, c, t, layers in ((0, 0, 0, 4), (3, CONTEXT // 2, 1, layers_of_middle), (-1, CONTEXT - 1, -1, 4)):
        config = layout(size, layers=layers, recompute=recompute)
        rank = rank_at(config, d % (WORLD // CONTEXT // TENSOR[size]), c, t % TENSOR[size])
        tallies = counted(config, rank)
        assert tallies == expected_traffic(config, c), rank
        model = config.model
        window = 2 * (model.kv_heads // TENSOR[size]) * model.head_size * (model.window - 1) * BF16
        ways = 2 if 0 < c < CONTEXT - 1 else 1
        local = [bytes_ for (_, _, label), (_, bytes_) in tallies.items() if label.endswith("local.halo")]
        assert local == [ways * window] * (3 * model.num_layers // 4)


def context_bytes(tallies: Tallies, kind: str = "") -> int:
    return sum(bytes_ for (group, _, label), (_, bytes_) in tallies.items() if group == "cp" and kind in label)


@both_sizes
@pytest.mark.parametrize("seq_len", [32768, 131072])
def test_share_of_what_gathering_every_layer_receives(size: str, seq_len: int) -> None:
    config = layout(size, layers=4, seq_len=seq_len)
    rank = rank_at(config, 3, CONTEXT // 2, 1)
    ours = counted(config, rank)
    gathering = counted(layout(size, layers=4, seq_len=seq_len, strategy="allgather"), rank)
    # A key, its value and their gradients, were those in bf16 too.
    key = 2 * 2 * (config.model.kv_heads // TENSOR[size]) * config.model.head_size * BF16
    every_key = 4 * key * (seq_len - seq_len // CONTEXT)
    assert every_key < context_bytes(gathering)
    assert context_bytes(ours, "local") == 3 * key * (config.model.window - 1)
    if size == "7B":  # 70B has an eighth of the key/value heads: little to gather, as many queries for global layers
        assert context_bytes(ours) <= 0.1 * every_key


@both_sizes
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_memory_that_a_block_keeps_for_backward(size: str, recompute: str) -> None:
    config = layout(size, layers=4, recompute=recompute)
    model, tp, n = config.model, TENSOR[size], config.data.seq_len // CONTEXT
    D, H, G = model.head_size, model.num_attention_heads // tp, model.kv_heads // tp
    kept: list[int] = []
    with rank_of(WORLD, rank_at(config, 3, CONTEXT // 2, 1)):
        paper = model_on_paper(config, ParallelMesh.build(config.parallel))
        tokens = tokens_of_a_rank(config)
        with LiveBytes([tokens, *paper.parameters()]) as live:
            for module in (*paper.model.layers, paper.model.norm):
                module.register_forward_pre_hook(lambda *_: kept.append(live.now))
            paper(tokens, tokens).backward()
        gradients = sum(parameter.grad.nbytes for parameter in paper.parameters() if parameter.grad is not None)
    assert 0 <= live.now - gradients <= 1024, "of all that was kept or received, a table of frequencies remains"
    residual = n // tp * model.hidden_size * BF16
    heads_of_all_ranks = max(G, CONTEXT)  # of keys: at least one on each of them
    for spec, (before, after) in zip(resolve_specs(config), pairwise(kept[:5]), strict=True):
        if spec.is_local:
            halo = 2 * (model.window - 1) * G * D * BF16
            arrived = halo
            # The first window - 1 queries read the halo and as many keys of this rank, side by side.
            attention = n * (H + 2 * G) * D * BF16 + 2 * halo
        else:
            arrived = n * (H + 2 * heads_of_all_ranks) * D * BF16
            attention = arrived
        # From this: q, k and v; the kernel's outputs and log-sum-exps; the outputs as o_proj reads them.
        attention += 2 * n * H * D * BF16 + n * H * FP32
        if recompute == "full":
            expected = residual + arrived + (0 if spec.is_local else n * H * D * BF16)
        else:
            products = 2 if recompute == "selective" else 3  # gate, up, and what is made of them
            # The inputs and outputs of two norms, and one number per token.
            norms = 4 * residual + 2 * n // tp * FP32
            expected = norms + attention + products * n * model.ffn_hidden_size // tp * BF16
        assert after - before == expected, spec.kind
