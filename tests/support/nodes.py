"""Two nodes on this machine: network namespaces joined by a cable."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

NODES = {"megazebra1": "10.213.0.1", "megazebra2": "10.213.0.2"}
CABLE = "cable"
# Gloo would take the address of the machine's name, which is the loopback interface's of each namespace.
INTERFACE = {"GLOO_SOCKET_IFNAME": CABLE}


@contextmanager
def joined_nodes() -> Iterator[None]:
    """While the `with` block lasts; skips the test where that is not possible."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("needs root and `ip` (Debian: iproute2) for network namespaces")
    with ExitStack() as stack:
        for name in NODES:
            added = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
            if added.returncode != 0:
                pytest.skip(f"no network namespaces here: {added.stderr}")
            stack.callback(ip, "netns", "delete", name)
        one, two = NODES
        ip("-n", one, "link", "add", CABLE, "type", "veth", "peer", "name", CABLE, "netns", two)
        for name, address in NODES.items():
            ip("-n", name, "address", "add", f"{address}/24", "dev", CABLE)
            ip("-n", name, "link", "set", CABLE, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


def move_to_own_node() -> None:
    """Let rank 0 live on the first node and rank 1 on the second one, before they connect."""
    name = list(NODES)[int(os.environ["RANK"])]
    with open(f"/run/netns/{name}") as namespace:
        if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), 0):
            raise OSError(ctypes.get_errno(), "setns", namespace.name)
    os.environ.update(INTERFACE, MASTER_ADDR=next(iter(NODES.values())))
