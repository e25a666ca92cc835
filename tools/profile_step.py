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

import torch

from megazebra.config import check_world, load_config, parse_command_line
from megazebra.config.schema import Config
from megazebra.config.stages import one_stage
from megazebra.data.batch import MicroBatch
from megazebra.launch import complete_environment, readable_errors, world_size
from megazebra.models.build import build_model, forward, model_runtime
from megazebra.parallel.mesh import ParallelMesh
from megazebra.train.deepspeed_config import build_deepspeed_config
from megazebra.train.engine import TrainEngine, start_deepspeed
from megazebra.train.parts import REST, marked, table
from megazebra.train.session import own_device, part_of

MEASURED_STEPS = 3


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
        assert left == part, f"{part} ends within {left}"

    def charge(self) -> None:
        """The time that has passed since the last call belongs to the part being done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        self.seconds[self._parts[-1]] += now - self._since
        self._since = now


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
    engine = TrainEngine(
        config,
        mesh,
        device,
        build_deepspeed_config(config, world_size(), command.deepspeed_config_path),
        lambda: build_model(config, mesh, runtime),
        forward,
    )
    micro_batches = config.train.global_batch_size // (config.train.micro_batch_size * mesh.dp.size)
    batches = [part_of(random_batch(config, device), config, mesh) for _ in range(micro_batches)]
    clock = Clock(device)
    with marked(engine, clock):
        for step in range(1 + MEASURED_STEPS):
            if step == 1:
                clock.reset()
            engine.train_step(batches, step)
        clock.charge()
    if mesh.world.rank == 0:
        print(runtime.backend.reason)
        print(*table(clock.seconds, MEASURED_STEPS), sep="\n")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    with readable_errors():
        main()
