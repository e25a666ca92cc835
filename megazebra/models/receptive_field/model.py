"""The whole model: every layer holds the spec of its place, and in place it sees what that place should.

Legend: B rows, S tokens of a whole row, E channels (`marks` says what they are for).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from megazebra.config.schema import Config, RopeConfig
from megazebra.data.batch import MicroBatch
from megazebra.models.build import build_model, forward
from megazebra.models.initialization import initialize
from megazebra.models.layers import Block
from megazebra.models.receptive_field.findings import Finding, Judge, Seen
from megazebra.models.receptive_field.layer import Shards, run_dtype, seen
from megazebra.models.receptive_field.marks import SEED, hear_marks, narrowed
from megazebra.models.receptive_field.scenes import Documents, Place
from megazebra.models.runtime import ModelRuntime
from megazebra.models.zebra import ZebraDecoder
from megazebra.parallel.mesh import ParallelMesh
from megazebra.parallel.sharding import full_shape, shard_of
from megazebra.pattern import pattern_symbols

MAX_LAYERS = 8


def kind(window: int | None) -> str:
    """Layers of one kind, as tables name them."""
    return "global" if window is None else f"local {window}"


@dataclass(frozen=True)
class Expected:
    """What a layer should be: read from the pattern, apart from the specs that the model is built from."""

    symbol: str | int
    window: int | None
    rope: RopeConfig


def expected_layers(config: Config) -> list[Expected]:
    model = config.model
    windows = {"G": None, "L": model.window}
    return [
        Expected(
            symbol, windows[symbol] if isinstance(symbol, str) else symbol,
            model.rope_global if symbol == "G" else model.rope_local,
        )
        for symbol in pattern_symbols(model.pattern, model.num_layers)
    ]  # fmt: skip


def misplaced_layers(config: Config, mesh: ParallelMesh, runtime: ModelRuntime) -> Iterator[str]:
    """A sentence for every layer whose attention, or whose RoPE table, is that of another spec than its place's."""
    with torch.device("meta"):
        decoder = build_model(narrowed(config), mesh, runtime).model
    layers = zip(expected_layers(config), _blocks(decoder), decoder.specs, strict=True)
    for number, (expected, block, rope_spec) in enumerate(layers):
        place = f"layer {number}, {expected.symbol!r} in model.pattern,"
        for part, spec in (("attention", block.self_attn.spec), ("RoPE table", rope_spec)):
            if spec.window != expected.window:
                yield f"WRONG: {place} has the {part} of a {kind(spec.window)} one, not {kind(expected.window)}"
            elif spec.rope != expected.rope:
                yield f"WRONG: {place} has the {part} of another: {spec.rope!r}, not {expected.rope!r}"


class ProbedModel:
    """The first layers of the model, through training's own forward pass.

    The marked token has a row of the embedding. MLPs are silent, and so are all layers but those that a probe lets
    speak: final hidden states then show what these see, alone or one after the other.
    """

    def __init__(
        self, config: Config, mesh: ParallelMesh, runtime: ModelRuntime, device: torch.device, documents: Documents
    ) -> None:
        self.layers = expected_layers(config)[: min(len(config.model.pattern), MAX_LAYERS)]
        symbols = tuple(layer.symbol for layer in self.layers)
        small = narrowed(config)
        model = small.model.model_copy(update={"pattern": symbols, "num_layers": len(symbols)})
        self.config = small.model_copy(update={"model": model})
        self.mesh, self.device, self.documents = mesh, device, documents
        self.shards = Shards(mesh, runtime.sequence_parallel)
        with torch.device(device):
            self.model = build_model(self.config, mesh, runtime)
        initialize(self.model, model, SEED, mesh.tp)
        self.blocks = _blocks(self.model.model)
        self.voices = self._prepare_weights()
        self.model.to(run_dtype(config)).requires_grad_(False)
        self._hidden_BSE = torch.empty(0)
        self.model.model.register_forward_hook(self._keep)

    def findings(self, tokens: Sequence[Place]) -> Iterator[Finding]:
        """Every layer alone, then all of them: a token reaches as far then as their windows add up to."""
        windows = [layer.window for layer in self.layers]
        together = None if None in windows else 1 + sum(window - 1 for window in windows if window is not None)
        cases = [(f"layer {number} in the model", [number], window) for number, window in enumerate(windows)]
        for label, speaking, window in [*cases, (f"{len(windows)} layers together", range(len(windows)), together)]:
            judge = Judge(label, window)
            for token in tokens:
                yield from judge.outputs(token, self._reached(token, speaking), self.documents, "hidden states")

    def _reached(self, token: Place, speaking: Sequence[int]) -> Seen:
        for number, (block, voice) in enumerate(zip(self.blocks, self.voices, strict=True)):
            block.self_attn.o_proj.weight.copy_(voice if number in speaking else torch.zeros_like(voice))
        with torch.no_grad():
            forward(self.model, self._batch(token).context_slice(self.mesh.cp.rank, self.mesh.cp.size).to(self.device))
        heads = self.config.model.num_attention_heads
        return seen(self.shards, self._hidden_BSE[..., :heads] != 0, heads)

    def _batch(self, marked: Place) -> MicroBatch:
        shape, masked = self.documents.start_BS.shape, self.config.data.document_mask
        mark = self.config.model.vocab_size - 1
        tokens_BS = torch.randint(0, mark, shape, generator=torch.Generator().manual_seed(SEED))
        tokens_BS[marked] = mark
        return MicroBatch(
            tokens_BS=tokens_BS,
            labels_BS=torch.zeros_like(tokens_BS),
            positions_BS=torch.from_numpy(self.documents.positions()),
            document_lengths=[list(row) for row in self.documents.lengths] if masked else None,
            sample_indices=[-1] * shape[0],
            valid_tokens=tokens_BS.numel(),
            seq_len=self.config.data.seq_len,
        )

    @torch.no_grad()
    def _prepare_weights(self) -> list[Tensor]:
        """Every layer's output projection where it speaks."""
        model, tp = self.config.model, self.mesh.tp
        heads, embedding = model.num_attention_heads, self.model.model.embed_tokens.weight
        full = torch.zeros(full_shape(embedding, embedding.shape))
        full[:, heads:].normal_(generator=torch.Generator().manual_seed(SEED))
        full[-1, :heads] = 1
        embedding.copy_(shard_of(full.to(self.device), embedding, embedding.shape, tp))
        S = self.documents.start_BS.shape[1]
        for block, expected in zip(self.blocks, self.layers, strict=True):
            hear_marks(block.self_attn, heads, model.kv_heads, tp, min(expected.window or S, S))
            block.mlp.down_proj.weight.zero_()
        return [block.self_attn.o_proj.weight.clone() for block in self.blocks]

    def _keep(self, module: nn.Module, inputs: object, hidden_BSE: Tensor) -> None:
        self._hidden_BSE = hidden_BSE


def _blocks(decoder: ZebraDecoder) -> list[Block]:
    return cast("list[Block]", list(decoder.layers))
