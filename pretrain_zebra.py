"""Pretrain a Zebra model.

deepspeed --num_gpus 2 pretrain_zebra.py --config examples/tiny_cpu.yaml --train.steps=50 --parallel.tensor=2

`python pretrain_zebra.py --help` lists every key.
"""

from __future__ import annotations

import sys

from megazebra.config import check_world, load_config, parse_command_line
from megazebra.launch import complete_environment, readable_errors, world_size
from megazebra.train.deepspeed_config import build_deepspeed_config


def main() -> None:
    complete_environment()
    # Mistakes in the configuration show before torch is imported, which takes seconds.
    command = parse_command_line(sys.argv[1:])
    config = load_config(command.config_path, command.overrides)
    check_world(config, world_size())
    deepspeed_config = build_deepspeed_config(config, world_size(), command.deepspeed_config_path)

    from megazebra.train.loop import train
    from megazebra.train.session import open_session

    with open_session(config, deepspeed_config) as session:
        train(session)


if __name__ == "__main__":
    with readable_errors():
        main()
