"""What strategies do to the graph: the order of messages in backward, who waits for whom, what stays alive."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from support.distributed import run_distributed

from megazebra.attention.backend import resolve_backend
from megazebra.config import ModelConfig, ParallelConfig, RopeConfig
from megazebra.context import halo
from megazebra.context.replay import Replay
from megazebra.models.initialization import load_full_weights
from megazebra.models.runtime import ModelRuntime
from megazebra.models.zebra import ZebraModel
from megazebra.parallel.mesh import Group, ParallelMesh
from megazebra.parallel.messages import Flight, Message
from megazebra.parallel.sharding import full_shape
from megazebra.pattern import AttentionSpec

CPU = torch.device("cpu")
BLOCKED = resolve_backend("blocked", [], head_dim=8, dtype=torch.float32, device=CPU)
SHARD = 12


def order_of_backward(window: int) -> list[str]:
    """What a halo layer with sinks does in backward, in order."""
    mesh = ParallelMesh.build(ParallelConfig(context=2))
    log: list[str] = []

    class LoggedFlight(Flight):
        def __init__(self, sends: Sequence[Message], receives: Sequence[Message], group: Group, label: str) -> None:
            log.append(f"send to {[peer for peer, _ in sends]}, receive from {[peer for peer, _ in receives]}")
            super().__init__(sends, receives, group, label)

    halo.Flight = LoggedFlight  # type: ignore[misc]
    q, k, v = (torch.randn(1, SHARD, 4, 8, requires_grad=True) for _ in range(3))
    sinks = torch.zeros(4, requires_grad=True)
    sinks.register_post_accumulate_grad_hook(lambda _: log.append("gradient of the sinks"))
    spec = AttentionSpec(window, RopeConfig(), sinks=True, context="halo")
    rest = BLOCKED.attend

    def attend(*args: torch.Tensor, **options: object) -> torch.Tensor:
        out = rest(*args, **options)
        if out.shape[1] == SHARD - window + 1:
            out.register_hook(lambda _: log.append("rows that need no halo"))
        return out

    out = halo.attend(
        q, k, v, spec=spec, packing=None, backend=replace(BLOCKED, attend=attend), group=mesh.cp, sinks_H=sinks
    )
    log.clear()
    out.sum().backward()
    return log


def test_gradients_of_the_halo_leave_first_and_parameters_get_theirs_last() -> None:
    first, second = run_distributed(order_of_backward, 2, 5)
    # The hook on the rows' output runs when their own backward is about to: the first rank has no others.
    assert first == ["send to [], receive from [1]", "gradient of the sinks"]
    assert second == ["send to [0], receive from []", "rows that need no halo", "gradient of the sinks"]


def test_the_order_is_the_same_where_every_row_reads_the_halo() -> None:
    """ZeRO reduces a parameter's gradient as soon as it is there: ranks that differ here would wait for each other."""
    first, second = run_distributed(order_of_backward, 2, SHARD + 1)
    assert first == ["send to [], receive from [1]", "gradient of the sinks"]
    assert second == ["send to [0], receive from []", "gradient of the sinks"]


def small_model(mesh: ParallelMesh, local: str, global_: str, recompute: str) -> ZebraModel:
    config = ModelConfig(num_layers=4, hidden_size=32, ffn_hidden_size=40, num_attention_heads=4, num_kv_heads=2,
                         vocab_size=61, pattern="LLLG", window=5)  # fmt: skip
    specs = [replace(spec, context=local if spec.is_local else global_) for spec in config.attention_specs()]
    model = ZebraModel(config, mesh, ModelRuntime(backend=BLOCKED, recompute=recompute), specs)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.randn(full_shape(p, p.shape), generator=generator) * 0.1 for name, p in model.named_parameters()
    }
    load_full_weights(model, weights, mesh.tp)
    return model


def train_queries_only(recompute: str) -> float:
    mesh = ParallelMesh.build(ParallelConfig(context=2))
    model = small_model(mesh, "halo", "ulysses", recompute)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("q_proj" in name)
    tokens = torch.randint(0, 61, (2, 12), generator=torch.Generator().manual_seed(mesh.cp.rank))
    for _ in range(2):
        model(tokens, tokens).backward()
    return sum(float(p.grad.norm()) for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_frozen_keys_send_nothing_back(recompute: str) -> None:
    """A rank that waited for gradients that nobody computes would take another layer's for them."""
    assert all(norm > 0 for norm in run_distributed(train_queries_only, 2, recompute, timeout=60))


def bytes_of_dropped_losses(local: str, global_: str) -> list[int]:
    """Memory in tensors that are alive after each of several forward passes without a backward."""
    mesh = ParallelMesh.build(ParallelConfig(context=2))
    model = small_model(mesh, local, global_, "full")
    tokens = torch.randint(0, 61, (1, 128))
    alive = []
    for _ in range(4):
        loss = model(tokens, tokens)
        del loss
        gc.collect()
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in gc.get_objects()
                    if type(x) is torch.Tensor}  # fmt: skip
        alive.append(sum(storages.values()))
    return alive


@pytest.mark.parametrize(
    ("local", "global_"), [("halo", "ulysses"), ("allgather", "allgather"), ("ulysses", "ulysses")]
)
def test_a_loss_that_is_dropped_leaves_nothing(local: str, global_: str) -> None:
    for alive in run_distributed(bytes_of_dropped_losses, 2, local, global_):
        # Tables that are made once may come after the first pass; a graph would add at least a layer's input each time.
        assert alive[-1] - alive[1] < 64 * 32 * 4, alive


def test_a_recomputed_graph_has_one_backward() -> None:
    replay = Replay()
    replay.begin()
    assert replay.receive(lambda: 3) == 3
    replay.begin()
    assert replay.receive(lambda: 4) == 3, "what came the first time"
    replay.begin()
    with pytest.raises(AssertionError, match="one backward"):
        replay.receive(lambda: 5)
