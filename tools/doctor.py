"""What every layer really sees under your configuration: the receptive-field test.

deepspeed --num_gpus 4 tools/doctor.py --config examples/zebra_7b.yaml --parallel.context=2

Takes the options of pretrain_zebra.py; reads no data. For every kind of layer, under the layout, packing, attention
backend and precision of the configuration, one token at a time is marked and looked for in the outputs of all queries,
and the gradient of one query at a time is looked for in all tokens: around the ranks' boundaries, the windows' edges
and the documents' ends. Then the same for the first layers of the model, in their places. Only the heads, the windows
and the layout have their real size.

A kind of layer costs up to 16 passes of attention over data.seq_len tokens, forward, and 16 with backward: 32 heads of
128 and 4,096 tokens take a minute on two CPU cores, four times as long for twice the tokens. With a lower data.seq_len,
a few windows for every rank show as much. Exits with 1 when a query sees what it should not, or misses what it should.
"""

from __future__ import annotations

import sys

from megazebra.config import check_world, load_config, parse_command_line
from megazebra.config.stages import one_stage
from megazebra.launch import complete_environment, readable_errors, world_size


def main() -> None:
    complete_environment()
    # Mistakes in the configuration show before torch is imported, which takes seconds.
    command = parse_command_line(sys.argv[1:])
    config = one_stage(load_config(command.config_path, command.overrides), command.stage)
    check_world(config, world_size())

    import torch

    from megazebra.models.build import model_runtime
    from megazebra.models.receptive_field.report import examine
    from megazebra.parallel.mesh import ParallelMesh
    from megazebra.train.engine import start_deepspeed
    from megazebra.train.session import own_device

    device = own_device()
    runtime = model_runtime(config, device)
    start_deepspeed(device, config.parallel.timeout_s)
    mesh = ParallelMesh.build(config.parallel, device)

    def say(line: str) -> None:
        if mesh.world.rank == 0:
            print(line, flush=True)

    healthy = examine(config, mesh, runtime, device, say)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    sys.exit(0 if healthy else 1)


if __name__ == "__main__":
    with readable_errors():
        main()
