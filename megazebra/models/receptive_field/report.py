"""The whole examination of a configuration: every kind of layer by itself, then the layers in their places."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from megazebra.config.schema import Config
from megazebra.context.choice import layer_shape, resolve_specs
from megazebra.models.receptive_field.findings import Finding, Judge, sentences
from megazebra.models.receptive_field.layer import ProbedLayer
from megazebra.models.receptive_field.model import ProbedModel, kind, misplaced_layers
from megazebra.models.receptive_field.scenes import Scene, scenes
from megazebra.models.runtime import ModelRuntime
from megazebra.parallel.collectives import gather_objects
from megazebra.parallel.mesh import ParallelMesh

_HEADER = f"{'layers':<16}{'strategy':<11}{'backend':<11}{'tokens':>7}{'queries':>9}  {'outputs':<12}gradients"


def examine(
    config: Config, mesh: ParallelMesh, runtime: ModelRuntime, device: torch.device, say: Callable[[str], None]
) -> bool:
    """Whether every query sees exactly its keys. All ranks go through it; `say` is given the report line by line.

    Raises ValueError when a context-parallel strategy asked for can't serve its layers.
    """
    say(f"layout   {_layout(config, mesh, runtime, device)}")
    say(f"kernels  {runtime.backend.reason}")
    say(_HEADER)
    wrong: list[str] = []
    for result in examine_layers(config, mesh, runtime, device):
        say(result.row())
        wrong += sentences(result.findings)
    misplaced = list(misplaced_layers(config, mesh, runtime))
    say(f"{config.model.num_layers} layers hold what model.pattern says: {'WRONG' if misplaced else 'ok'}")
    number, findings = examine_model(config, mesh, runtime, device)
    say(f"the first {number} do it, one by one and together: {'WRONG' if findings else 'ok'}")
    wrong += [*misplaced, *sentences(findings)]
    for sentence in wrong or ["every query sees exactly the keys that it should, in outputs and in gradients"]:
        say(sentence)
    return not wrong


@dataclass(frozen=True)
class Result:
    """What was found of one kind of layer. tokens were looked for in outputs, the gradients of queries were taken."""

    layers: str
    strategy: str
    backend: str
    tokens: int
    queries: int
    findings: list[Finding]

    def row(self) -> str:
        return (
            f"{self.layers:<16}{self.strategy:<11}{self.backend:<11}{self.tokens:>7}{self.queries:>9}  "
            f"{self.verdict('outputs'):<12}{self.verdict('gradients')}"
        )

    def verdict(self, test: str) -> str:
        return ", ".join(sorted({each.verdict for each in self.findings if each.test == test})) or "ok"


def examine_layers(config: Config, mesh: ParallelMesh, runtime: ModelRuntime, device: torch.device) -> Iterator[Result]:
    """Every distinct kind of layer by itself; the same results on all ranks."""
    specs = resolve_specs(config)
    for spec in dict.fromkeys(specs):
        judge = Judge(kind(spec.window), spec.window)
        findings: list[Finding] = []
        stages = _scenes(config, spec.window)
        for scene in stages:
            layer = ProbedLayer(config, spec, mesh, runtime, device, scene.documents)
            for token in scene.tokens:
                findings += judge.outputs(token, layer.outputs(token), scene.documents)
            for query in scene.queries:
                findings += judge.gradients(query, layer.gradients(query), scene.documents)
        yield Result(
            layers=f"{specs.count(spec)} {judge.layers}",
            strategy=spec.context if mesh.cp.size > 1 else "-",
            backend=runtime.backend.name,
            tokens=sum(len(scene.tokens) for scene in stages),
            queries=sum(len(scene.queries) for scene in stages),
            findings=_of_all_ranks(findings, mesh),
        )


def examine_model(
    config: Config, mesh: ParallelMesh, runtime: ModelRuntime, device: torch.device
) -> tuple[int, list[Finding]]:
    """How many layers were probed in their places, and what was found; the same on all ranks."""
    scene = _scenes(config, config.model.window)[-1]
    model = ProbedModel(config, mesh, runtime, device, scene.documents)
    return len(model.layers), _of_all_ranks(list(model.findings(scene.tokens)), mesh)


def _scenes(config: Config, window: int | None) -> list[Scene]:
    shape = layer_shape(config)
    return scenes(
        rows=shape.batch,
        seq_len=shape.seq_len,
        unpadded=config.data.seq_len,
        ranks=shape.ranks,
        window=window,
        masked=config.data.document_mask,
    )


def _of_all_ranks(findings: list[Finding], mesh: ParallelMesh) -> list[Finding]:
    """Replicas could differ, and one that fails is enough."""
    return list(dict.fromkeys(each for of_rank in gather_objects(findings, mesh.world) for each in of_rank))


def _layout(config: Config, mesh: ParallelMesh, runtime: ModelRuntime, device: torch.device) -> str:
    return (
        f"{mesh.describe()}, sequence parallel {'on' if runtime.sequence_parallel else 'off'}, "
        f"{config.train.precision}, {config.train.micro_batch_size} x {config.data.seq_len:,} tokens, "
        f"{'documents masked' if config.data.document_mask else 'no document mask'}, {device.type}"
    )
