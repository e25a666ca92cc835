"""Where the time of a training step goes, by part of the model.

python tools/profile_step.py --config examples/tiny_cpu.yaml --train.compile=true

Takes the options of pretrain_zebra.py, builds model and engine as training does, and trains on random tokens: one
step to warm up, then three that are measured. Under a launcher the table is rank 0's. A GPU is waited for between
parts, which makes the step a little slower than it is.
"""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from megazebra.config import check_world, load_config, parse_command_line
from megazebra.config.schema import Config
from megazebra.config.stages import one_stage
from megazebra.data.batch import MicroBatch
from megazebra.launch import complete_environment, readable_errors, world_size
from megazebra.models.build import build_model, forward, model_runtime
from megazebra.models.runtime import ModelRuntime
from megazebra.parallel.linear import ColumnParallelLinear, RowParallelLinear
from megazebra.parallel.mesh import ParallelMesh
from megazebra.train.deepspeed_config import build_deepspeed_config
from megazebra.train.engine import TrainEngine, start_deepspeed
from megazebra.train.session import own_device, part_of

MEASURED_STEPS = 3
REST = "the rest"


class Clock:
    """Seconds of every part, forward and backward; of parts within parts, the inner one's count."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.reset()

    def reset(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._parts = [REST]
        self._since = time.perf_counter()

    def enter(self, part: str) -> None:
        self.charge()
        self._parts.append(part)

    def leave(self, part: str) -> None:
        self.charge()
        left = self._parts.pop()
        assert left == part, f"backward left {left} where {part} ends"

    def charge(self) -> None:
        """The time that has passed since the last call belongs to the part being done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        self.seconds[self._parts[-1]] += now - self._since
        self._since = now

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, its time and that of its backward counted as the part's."""

        def call(*args: Any, **kwargs: Any) -> Any:
            differentiable = [i for i, x in enumerate(args) if isinstance(x, Tensor) and x.requires_grad]
            if torch.is_grad_enabled() and differentiable:
                marked = _EndOfBackward.apply(self, part, *(args[i] for i in differentiable))
                args = tuple(marked[differentiable.index(i)] if i in differentiable else x for i, x in enumerate(args))
            self.enter(part)
            out = function(*args, **kwargs)
            self.leave(part)
            return _BeginOfBackward.apply(self, part, out) if isinstance(out, Tensor) and out.requires_grad else out

        return call


class _EndOfBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, clock: Clock, part: str, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.clock, ctx.part = clock, part
        return tuple(x.view_as(x) for x in inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ctx.clock.leave(ctx.part)
        return None, None, *grads


class _BeginOfBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, clock: Clock, part: str, out: Tensor) -> Tensor:
        ctx.clock, ctx.part = clock, part
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, Tensor]:
        ctx.clock.enter(ctx.part)
        return None, None, grad


def timed_runtime(runtime: ModelRuntime, clock: Clock) -> ModelRuntime:
    attend = {kind: clock.timed(f"attention, {kind} layers", runtime.backend.attend) for kind in ("global", "local")}
    functions = runtime.elementwise
    return replace(
        runtime,
        backend=replace(runtime.backend, attend=lambda *qkv, spec, **more: attend[spec.kind](*qkv, spec=spec, **more)),
        elementwise=SimpleNamespace(
            rms_norm=clock.timed("RMSNorm", functions.rms_norm),
            swiglu=clock.timed("SwiGLU product", functions.swiglu),
            rotate=clock.timed("RoPE", functions.rotate),
        ),
    )


def timed_model(config: Config, mesh: ParallelMesh, runtime: ModelRuntime, clock: Clock) -> nn.Module:
    model: nn.Module = build_model(config, mesh, timed_runtime(runtime, clock))
    model.lm_head.forward = clock.timed("output layer, loss", model.lm_head.forward)  # type: ignore[union-attr]
    for module in model.modules():
        if isinstance(module, ColumnParallelLinear | RowParallelLinear):
            module.forward = clock.timed("linear layers", module.forward)  # type: ignore[method-assign]
    return model


def random_batch(config: Config, device: torch.device) -> MicroBatch:
    shape = (config.train.micro_batch_size, config.data.seq_len)
    tokens_BS, labels_BS = torch.randint(0, config.model.vocab_size, (2, *shape), device=device)
    positions_BS = torch.arange(shape[1], device=device).expand(shape)
    return MicroBatch(tokens_BS, labels_BS, positions_BS, None, [-1] * shape[0], labels_BS.numel(), shape[1])


def main() -> None:
    complete_environment()
    command = parse_command_line(sys.argv[1:])
    config = one_stage(load_config(command.config_path, command.overrides), command.stage)
    check_world(config, world_size())
    device = own_device()
    runtime = model_runtime(config, device)
    start_deepspeed(device, config.parallel.timeout_s)
    mesh = ParallelMesh.build(config.parallel, device)
    clock = Clock(device)
    engine = TrainEngine(
        config,
        mesh,
        device,
        build_deepspeed_config(config, world_size(), command.deepspeed_config_path),
        lambda: timed_model(config, mesh, runtime, clock),
        forward,
    )
    engine.deepspeed.step = clock.timed("optimizer", engine.deepspeed.step)
    micro_batches = config.train.global_batch_size // (config.train.micro_batch_size * mesh.dp.size)
    batches = [part_of(random_batch(config, device), config, mesh) for _ in range(micro_batches)]
    for step in range(1 + MEASURED_STEPS):
        if step == 1:
            clock.reset()
        engine.train_step(batches, step)
    clock.charge()
    if mesh.world.rank == 0:
        print(runtime.backend.reason)
        print(*table(clock.seconds), sep="\n")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def table(seconds: dict[str, float]) -> list[str]:
    whole = sum(seconds.values())
    parts = sorted(seconds.items(), key=lambda item: -item[1])
    lines = [f"{part:<26}{s / MEASURED_STEPS * 1e3:>12,.1f} ms{s / whole:>8.1%}" for part, s in parts]
    return [*lines, f"{'a step':<26}{whole / MEASURED_STEPS * 1e3:>12,.1f} ms"]


if __name__ == "__main__":
    with readable_errors():
        main()
