"""Pretrain a Zebra model.

deepspeed --num_gpus 2 pretrain_zebra.py --config examples/tiny_cpu.yaml --train.steps=50 --parallel.tensor=2

`python pretrain_zebra.py --help` lists every key.
"""

from __future__ import annotations

import sys

from megazebra.config import ConfigError, check_world, load_config, parse_command_line
from megazebra.config.stages import stages_of
from megazebra.launch import (
    REQUEUE_EXIT_CODE,
    complete_environment,
    end_when_asked_to_stop,
    readable_errors,
    world_size,
)
from megazebra.train.deepspeed_config import build_deepspeed_config


def main() -> None:
    end_when_asked_to_stop()
    complete_environment()
    # Mistakes in the configuration show before torch is imported, which takes seconds.
    command = parse_command_line(sys.argv[1:])
    if command.stage is not None:
        raise ConfigError([f"command line --stage={command.stage}: training goes through all stages; remove it"])
    config = load_config(command.config_path, command.overrides)
    stages = stages_of(config)
    for stage in stages:
        check_world(stage.config, world_size())
    deepspeed_configs = [
        build_deepspeed_config(stage.config, world_size(), command.deepspeed_config_path) for stage in stages
    ]

    from megazebra.train.loop import train
    from megazebra.train.session import open_session, open_world, stages_left

    stopped_by = None
    with open_world() as world:
        for stage in stages_left(stages, world):
            with open_session(config, stage, world, deepspeed_configs[stage.number]) as session:
                stopped_by = train(session)
            if stopped_by is not None:
                break
    sys.exit(0 if stopped_by is None else REQUEUE_EXIT_CODE)


if __name__ == "__main__":
    with readable_errors():
        main()
