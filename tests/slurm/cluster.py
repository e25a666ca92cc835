"""A real Slurm of two nodes on this machine: its own munge key, ports and folder; gone when the `with` block ends."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "sinfo")

# Addresses of the loopback interface are names of nodes that resolve everywhere.
_CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort=17000
AuthInfo=socket={folder}/munge.socket
SlurmUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SlurmdParameters=config_overrides
MpiDefault=none
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=127.0.0.[2-3] NodeHostname=localhost Port=[17001-17002] CPUs=4
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 GraceTime=60
PartitionName=high Nodes=ALL PriorityTier=2 PreemptMode=OFF
"""


def obstacle() -> str | None:
    """Why no Slurm can be started here; None where one can."""
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        return f"{', '.join(missing)} not installed: `make test-slurm` installs them, as root on Debian"
    return None if os.geteuid() == 0 else "slurmd runs jobs as root only"


@contextmanager
def running_slurm() -> Iterator[dict[str, str]]:
    """Yields the environment in which Slurm's commands find the cluster. Raises TimeoutError if it does not come up."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.chmod(0o711)  # munge wants its socket where everyone can reach it
        (folder / "state").mkdir()
        (folder / "key").write_bytes(os.urandom(128))
        (folder / "key").chmod(0o400)
        configuration = folder / "slurm.conf"
        configuration.write_text(_CONFIGURATION.format(host=socket.gethostname(), folder=folder))
        environment = {**os.environ, "SLURM_CONF": str(configuration)}
        files = {"socket": "munge.socket", "key-file": "key", "pid-file": "pid", "seed-file": "seed", "log-file": "log"}
        stack.enter_context(
            _daemon("munged", "--foreground", *(f"--{name}={folder / file}" for name, file in files.items()))
        )
        _wait_until((folder / "munge.socket").exists, "munged")
        stack.enter_context(_daemon("slurmctld", "-D", "-c", "-f", str(configuration)))
        for node in ("127.0.0.2", "127.0.0.3"):
            stack.enter_context(_daemon("slurmd", "-D", "-N", node, "-f", str(configuration)))

        def idle() -> bool:
            command = ["sinfo", "--noheader", "--partition=low", "--states=idle", "--format=%D"]
            return subprocess.run(command, env=environment, capture_output=True, text=True).stdout.strip() == "2"

        _wait_until(idle, "slurmd")
        stack.callback(_cancel_all, environment)
        yield environment


def _cancel_all(environment: dict[str, str]) -> None:
    subprocess.run(["scancel", "--user=root"], env=environment, check=True)

    def none_left() -> bool:
        return not subprocess.run(["squeue", "--noheader"], env=environment, capture_output=True).stdout.strip()

    _wait_until(none_left, "scancel")


@contextmanager
def _daemon(*command: str) -> Iterator[None]:
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_until(done: Callable[[], bool], what: str, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not there after {seconds} s")
        time.sleep(0.2)
