"""Two nodes without Slurm: network namespaces joined by a cable, deepspeed over ssh and torchrun's rendezvous."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.command_line import arguments, environment, finish, launch, losses
from support.nodes import INTERFACE, NODES, joined_nodes

PROGRAMS = ("sshd", "ssh", "ssh-keygen", "pdsh")
MISSING = [program for program in PROGRAMS if shutil.which(program) is None]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(bool(MISSING), reason=f"{MISSING} not installed: `make test-multinode` installs them on Debian"),
]

BIN = Path(sys.executable).parent
OPTIONS = ["--train.micro_batch_size=1", "--parallel.tensor=2"]


@pytest.fixture(scope="module")
def nodes() -> Iterator[None]:
    with joined_nodes():
        yield


def on(node: str, *command: str, **variables: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        ["ip", "netns", "exec", node, *command],
        env=environment(**INTERFACE, **variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


@pytest.fixture(scope="module")
def single_node(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("single")
    process = launch(29631, *arguments(corpus, run_dir, *OPTIONS), ranks=4)
    output = finish(process, 200)
    assert process.returncode == 0, output
    return run_dir


def test_torchrun_between_two_nodes(nodes: None, single_node: Path, corpus: Path, tmp_path: Path) -> None:
    first = next(iter(NODES.values()))
    # torchrun finds out by the machine's name whether it is the host, and both nodes have the same one here.
    processes = [
        on(
            node, str(BIN / "torchrun"), "--nnodes=2", "--nproc-per-node=2", "--rdzv-backend=c10d", "--rdzv-id=test",
            f"--rdzv-endpoint={first}:29400", f"--rdzv-conf=is_host={int(address == first)}",
            f"--local-addr={address}", *arguments(corpus, tmp_path, *OPTIONS),
        )
        for node, address in NODES.items()
    ]  # fmt: skip
    outputs = [finish(process, 200) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert losses(tmp_path) == losses(single_node)


@pytest.fixture
def ssh(nodes: None, tmp_path: Path) -> Iterator[Path]:
    """A folder for PATH whose ssh has a key for both nodes, as a user's own would."""
    for name in ("key", "host_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / name], check=True)
    (tmp_path / "bin").mkdir()
    client = tmp_path / "bin" / "ssh"
    client.write_text(
        f"#!/bin/sh\nexec {shutil.which('ssh')} -F none -i {tmp_path}/key -o IdentitiesOnly=yes -o LogLevel=ERROR "
        '-o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null "$@"\n'
    )
    client.chmod(0o755)
    options = {
        "HostKey": tmp_path / "host_key", "AuthorizedKeysFile": tmp_path / "key.pub", "PidFile": "none",
        "StrictModes": "no", "UsePAM": "no", "PermitRootLogin": "prohibit-password",
    }  # fmt: skip
    (tmp_path / "sshd_config").write_text("".join(f"{name} {value}\n" for name, value in options.items()))
    separation = Path("/run/sshd")  # sshd refuses to start without
    made = not separation.exists()
    separation.mkdir(exist_ok=True)
    daemons = [on(node, str(shutil.which("sshd")), "-D", "-e", "-f", str(tmp_path / "sshd_config")) for node in NODES]
    time.sleep(1)
    assert [daemon.poll() for daemon in daemons] == [None, None]
    yield tmp_path / "bin"
    for daemon in daemons:
        daemon.terminate()
        daemon.communicate(timeout=20)
    if made:
        separation.rmdir()


def test_deepspeed_over_ssh(nodes: None, ssh: Path, single_node: Path, corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "hostfile").write_text("".join(f"{address} slots=2\n" for address in NODES.values()))
    # What ranks on other nodes need of the environment; DeepSpeed looks for the file in the working directory too.
    variables = {**INTERFACE, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    (tmp_path / "deepspeed_env").write_text("".join(f"{name}={value}\n" for name, value in variables.items()))
    run_dir, (node, address) = tmp_path / "run", next(iter(NODES.items()))
    process = on(
        node, str(BIN / "deepspeed"), "--hostfile", str(tmp_path / "hostfile"), "--master_addr", address,
        "--master_port", "29632", *arguments(corpus, run_dir, *OPTIONS),
        PATH=f"{ssh}:{os.environ['PATH']}", DS_ENV_FILE=str(tmp_path / "deepspeed_env"),
    )  # fmt: skip
    output = finish(process, 200)
    assert process.returncode == 0, output
    assert losses(run_dir) == losses(single_node)
