"""When ZeRO-3 gathers weights: DeepSpeed's own rules, played through for one micro-batch. Imports no torch.

DeepSpeed 0.19 (`PartitionedParameterCoordinator`) records the modules of a forward and backward pass once and follows
that trace from then on: a module's weights are gathered when it begins, those of the next modules are gathered ahead,
and after a module its weights are let go unless they are soon read again. How often a weight is gathered in a
micro-batch, once or twice, follows from three numbers of its configuration.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

from megazebra.config.schema import ModelConfig
from megazebra.plan.parameters import Parameter


@dataclass(frozen=True)
class ZeroSettings:
    """Keys of `zero_optimization` that decide what is sent, in elements; DeepSpeed's defaults.

    persistence_threshold: weights up to this size are whole on every rank. prefetch_bucket: gathered ahead at each
    module. max_live: no gathering ahead beyond so many. max_reuse_distance: a weight read again within so many stays.
    """

    persistence_threshold: int = 100_000
    prefetch_bucket: int = 50_000_000
    max_live: int = 1_000_000_000
    max_reuse_distance: int = 1_000_000_000
    reduce_bucket: int = 500_000_000


class Gathers(NamedTuple):
    """gathered: elements that all gathers of a micro-batch bring together. calls: how many gathers there are.
    live: most elements that were whole at a time, weights that always are not counted.
    """

    gathered: int
    calls: int
    live: int


class _Event(NamedTuple):
    what: Literal["begin", "end"]
    weights: tuple[str, ...]  # the module's own


@lru_cache(maxsize=256)
def gathers(
    model: ModelConfig, weights: tuple[Parameter, ...], recompute: str, ranks: int, zero: ZeroSettings
) -> Gathers:
    """Of one micro-batch in a run under way, for the weights of one tensor-parallel rank.

    Exact in every layout tried but two: where `max_live` and `max_reuse_distance` are both about the size of a block, a
    single weight more was seen gathered with biases on the MLP; with a prefetch bucket of one element, 15 % more.
    """
    return _Coordinator(list(_events(model, weights, recompute)), weights, ranks, zero).play()


class _Coordinator:
    def __init__(self, events: list[_Event], weights: Sequence[Parameter], ranks: int, zero: ZeroSettings) -> None:
        self.events, self.zero, self.ranks = events, zero, ranks
        self.numel = {weight.name: weight.numel for weight in weights}
        self.persistent = {name for name, numel in self.numel.items() if numel <= zero.persistence_threshold}
        self.order = [event.weights for event in events if event.what == "begin"]
        self.queue = deque((name, step) for step, names in enumerate(self.order) for name in names)
        self.seen = dict.fromkeys(self.numel, -1)  # the latest use that the queue is past
        self.available = set(self.persistent)
        self.live = self.most_live = self.gathered = self.calls = self.step = 0

    def play(self) -> Gathers:
        for event in self.events:
            if event.what == "begin":
                self._begin(event.weights)
            else:
                self._end(event.weights)
        return Gathers(self.gathered, self.calls, self.most_live)

    def _begin(self, names: tuple[str, ...]) -> None:
        self._gather(names)
        unseen = {name for name in names if self.seen[name] < self.step}
        for _ in range(len(unseen)):
            name, step = self.queue.popleft()
            self.seen[name] = step
        ahead, most = 0, min(self.zero.max_live - self.live, self.zero.prefetch_bucket)
        fetched = []
        while self.queue and ahead < most:
            name, step = self.queue.popleft()
            self.seen[name] = max(self.seen[name], step)
            if name not in self.available and name not in fetched:
                fetched.append(name)
                ahead += self.numel[name]
        self._gather(fetched)
        self.step += 1

    def _gather(self, names: Sequence[str]) -> None:
        missing = [name for name in names if name not in self.available]
        if not missing:
            return
        self.calls += 1
        self.available.update(missing)
        self.gathered += sum(-(-self.numel[name] // self.ranks) * self.ranks for name in missing)
        self.live += sum(self.numel[name] for name in missing)
        self.most_live = max(self.most_live, self.live)

    def _end(self, names: tuple[str, ...]) -> None:
        # A weight that the queue has passed over stays, or it would be gathered without anybody asking ahead.
        leaving = {name for name in names if name not in self.persistent and self.seen[name] <= self.step}
        distance = 0
        for later in self.order[self.step :]:
            if distance >= self.zero.max_reuse_distance or not leaving:
                break
            leaving.difference_update(later)
            distance += sum(self.numel[name] for name in later)
        for name in leaving & self.available:
            self.available.remove(name)
            self.live -= self.numel[name]


_MODULES_OF_A_BLOCK = (  # name and children, in the order of the forward pass
    ("input_layernorm", ()),
    ("self_attn", ("q_proj", "k_proj", "v_proj", "q_norm", "k_norm", "o_proj")),
    ("post_attention_layernorm", ()),
    ("mlp", ("gate_proj", "up_proj", "down_proj")),
)


def _events(model: ModelConfig, weights: Sequence[Parameter], recompute: str) -> Iterator[_Event]:
    own: dict[str, tuple[str, ...]] = {}
    for weight in weights:
        module = weight.name.rpartition(".")[0]
        own[module] = (*own.get(module, ()), weight.name)
    if model.tie_word_embeddings:
        own["lm_head"] = own["model.embed_tokens"]

    def begin(module: str) -> _Event:
        return _Event("begin", own.get(module, ()))

    def end(module: str) -> _Event:
        return _Event("end", own.get(module, ()))

    def alone(module: str) -> Iterator[_Event]:
        yield begin(module)
        yield end(module)

    def children(block: str, part: str, names: Sequence[str]) -> list[str]:
        found = [f"{block}.{part}.{name}" for name in names]
        return found if model.qk_norm else [name for name in found if not name.endswith(("q_norm", "k_norm"))]

    def block_forward(block: str) -> Iterator[_Event]:
        yield begin(block)
        for part, names in _MODULES_OF_A_BLOCK:
            yield begin(f"{block}.{part}")
            for child in children(block, part, names):
                yield from alone(child)
            yield end(f"{block}.{part}")
        yield end(block)

    def block_backward(block: str) -> Iterator[_Event]:
        yield begin(block)
        for part, names in reversed(_MODULES_OF_A_BLOCK):
            yield begin(f"{block}.{part}")
            for child in reversed(children(block, part, names)):
                yield begin(child)
                if child.endswith("down_proj") and recompute != "none":
                    yield from recomputed(block)
                yield end(child)
            yield end(f"{block}.{part}")
        yield end(block)

    def recomputed(block: str) -> Iterator[_Event]:
        """Up to the last input that backward needs: the down projection begins, its product is not made again."""
        if recompute == "selective":
            yield begin(f"{block}.mlp.down_proj")
            return
        last = list(block_forward(block))[: -(2 + 1)]  # of down_proj, mlp and the block, without their ends
        yield from last

    blocks = [f"model.layers.{i}" for i in range(model.num_layers)]
    yield begin("")
    yield begin("model")
    yield from alone("model.embed_tokens")
    for block in blocks:
        yield from block_forward(block)
    yield from alone("model.norm")
    yield end("model")
    yield from alone("lm_head")
    yield end("")
    yield begin("")
    yield from alone("lm_head")
    yield begin("model")
    yield from alone("model.norm")
    for block in reversed(blocks):
        yield from block_backward(block)
    yield from alone("model.embed_tokens")
