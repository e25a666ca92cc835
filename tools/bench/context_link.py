"""A slow link between two processes of one machine: two network namespaces joined by a limited veth pair. Linux.

It needs `ip` and `tc` (Debian: apt-get install iproute2), and root or a user namespace of one's own.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

INTERFACE = "link0"  # each namespace has its own
# A burst leaves at full speed: small against what is measured, but no packet larger than it would ever leave.
BURST, LONGEST_QUEUE = "128kb", "50ms"


class LinkRefusedError(Exception):
    """There can be no such link here; the text says why."""


@dataclass(frozen=True)
class End:
    """command: what a command line starts with to run at this end. interface: the link, as it is called there."""

    command: tuple[str, ...] = ()
    interface: str | None = None


@contextmanager
def slow_link(rate: str) -> Iterator[tuple[End, End]]:
    """The ends of a link that carries `rate` ('1gbit', as tc writes it) each way; it goes with the context.

    Raises LinkRefusedError where it can't be made.
    """
    if missing := [tool for tool in ("ip", "tc") if shutil.which(tool) is None]:
        raise LinkRefusedError(f"{' and '.join(missing)} not found; on Debian, apt-get install iproute2")
    names = [f"megazebra-{os.getpid()}-{end}" for end in range(2)]
    made: list[str] = []
    try:
        for name in names:
            _run("ip", "netns", "add", name)
            made.append(name)
        pair = ("type", "veth", "peer", "name", INTERFACE, "netns", names[1])
        _run("ip", "link", "add", INTERFACE, "netns", names[0], *pair)
        for end, name in enumerate(names):
            _run("ip", "-n", name, "address", "add", f"10.0.0.{end + 1}/30", "dev", INTERFACE)
            _run("ip", "-n", name, "link", "set", INTERFACE, "up")
            limit = ("tbf", "rate", rate, "burst", BURST, "latency", LONGEST_QUEUE)
            _run("tc", "-n", name, "qdisc", "add", "dev", INTERFACE, "root", *limit)
        first, second = (End(("ip", "netns", "exec", name), INTERFACE) for name in names)
        yield first, second
    finally:
        for name in made:
            subprocess.run(["ip", "netns", "delete", name], check=False)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise LinkRefusedError(f"`{' '.join(command)}` says {done.stderr.strip()!r}")


def received_bytes(interface: str) -> int:
    """All that has come in through the interface, headers and all. To be called in its namespace."""
    return int(Path(f"/sys/class/net/{interface}/statistics/rx_bytes").read_text())
