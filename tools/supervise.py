"""Start a training run, and start it again whenever it fails, until it is complete.

    python tools/supervise.py --ranks 4 -- pretrain_zebra.py --config examples/zebra_7b.yaml
    python tools/supervise.py --ranks 8 --min-ranks 4 --available 'nvidia-smi -L | wc -l' -- pretrain_zebra.py ...
    python tools/supervise.py --ranks 4 --launch 'torchrun --nproc_per_node {ranks} --master_port {port}' -- ...
    python tools/supervise.py --ranks 32 --launch 'env MASTER_PORT={port} srun --ntasks {ranks} --wait=60 python' -- ...

A run resumes from its newest checkpoint by itself. After a failure every process that is left is killed, and the next
start has a master port of its own. Fewer ranks than wanted (--available says how many there are) run where the layout
allows it, from --min-ranks on, and make way for more as soon as there are: the same samples are learned in the same
order. SIGTERM, SIGUSR1 and SIGHUP make the run save and stop.

Ends with 0 when the run is complete. With the run's own code at once for errors that starting again does not mend (2)
and on request (85), else when --max-restarts are used up or --max-fruitless failures in a row left no newer checkpoint.
Each start is recorded in the run folder's supervisor.jsonl. Ranks on other machines than this one are the launcher's to
end.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from megazebra.config import load_config, parse_command_line
from megazebra.config.stages import stages_of
from megazebra.launch import readable_errors
from megazebra.supervise.supervisor import Policy, Supervisor


def main(arguments: Sequence[str] | None = None) -> None:
    options, script = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    command = parse_command_line(script[1:])
    config = load_config(command.config_path, command.overrides)
    policy = Policy(**{name: value for name, value in vars(options).items() if name != "launch"})
    sys.exit(Supervisor(stages_of(config), Path(config.run.dir), options.launch, script, policy).run())


def parse_arguments(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    deepspeed = shlex.quote(str(Path(sys.executable).with_name("deepspeed")))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        usage="%(prog)s [options] -- pretrain_zebra.py ...",
    )  # fmt: skip
    add = parser.add_argument
    add("--ranks", type=int, required=True, help="processes wanted")
    add("--min-ranks", type=int, default=Policy.min_ranks, help="wait while there are fewer (default: 1)")
    add("--max-restarts", type=int, default=Policy.max_restarts, help="after failures (default: %(default)s)")
    add("--max-fruitless", type=int, default=Policy.max_fruitless,
        help="failures in a row without a newer checkpoint after which to give up (default: %(default)s)")  # fmt: skip
    add("--pause-s", type=float, default=Policy.pause_s,
        help="before starting again; doubles with every fruitless failure (default: %(default)g)")  # fmt: skip
    add("--available", metavar="COMMAND", help="prints how many ranks can run now")
    add("--look-again-s", type=float, default=Policy.look_again_s,
        help="how often --available is asked while there are too few (default: %(default)g)")  # fmt: skip
    add("--stop-s", type=float, default=Policy.stop_s,
        help="how long the run may take to save and stop (default: %(default)g)")  # fmt: skip
    add("--launch", metavar="COMMAND", default=f"{deepspeed} --num_gpus {{ranks}} --master_port {{port}}",
        help="the launcher, with {ranks} and {port} in it (default: DeepSpeed's, on this machine)")  # fmt: skip
    arguments = list(arguments)
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    options, script = parser.parse_args(arguments[:cut]), arguments[cut + 1 :]
    if not script:
        parser.error("nothing to run: write -- and the training program with its options after it")
    if not 1 <= options.min_ranks <= options.ranks:
        parser.error("--min-ranks must be from 1 to --ranks")
    return options, script


if __name__ == "__main__":
    with readable_errors():
        main()
