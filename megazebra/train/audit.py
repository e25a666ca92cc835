"""run.json: what each start of a run was made of, so that it can be repeated, and doubted.

A list of objects, one for every start of a stage (a resumed run has several), the oldest first:
    time               when it was written, UTC
    stage, first_step  the stage's name ('' without stages); updates made before this start
    command            program and arguments; working_directory: where they were given
    config             the whole configuration, stages included: config.yaml has that of the last start only
    deepspeed_config   what the user's own file adds to the generated one
    seed               train.seed of the stage
    hosts              ranks and devices of each host, by its name
    versions           of what computes: Python, torch, DeepSpeed, NCCL, kernels
    git                commit, dirty and the hash of what is not committed: of `megazebra` and of the working directory;
                       null for folders under no version control
    data, held_out     fingerprints of the corpora and of the rules that make samples of them
    init_from          where the weights came from, and the sha256 of that folder's checksums; null for random ones
    attention_backend  the kernels that `auto` chose
    determinism        torch's switches, and threads of rank 0
    environment        variables that change what is computed or how ranks talk; never keys or passwords
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import socket
import subprocess
import sys
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

import megazebra
from megazebra.checkpoint.weights import Weights
from megazebra.durable import write_atomically
from megazebra.errors import UserError
from megazebra.parallel.collectives import gather_objects
from megazebra.parallel.mesh import Group

FILE = "run.json"
Start = dict[str, Any]

_PACKAGES = ("deepspeed", "triton", "flash-attn", "flash-attn-3", "flash-attn-4")
_VARIABLES = re.compile(
    r"(OMP|MKL|KMP|GOMP|NCCL|GLOO|CUDA|CUBLAS|CUDNN|TORCH|PYTORCH|TRITON|DS|MEGAZEBRA)_\w+|WORLD_SIZE|LD_PRELOAD"
)
_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASS|CREDENTIAL", re.IGNORECASE)
_GIT_TIMEOUT_S = 20


def read_starts(folder: Path) -> list[Start]:
    """The starts of the run in a folder, the oldest first; none where nothing was recorded.

    Raises UserError when the file is damaged.
    """
    path = folder / FILE
    try:
        starts = json.loads(path.read_bytes())
    except FileNotFoundError:
        return []
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no JSON ({error}); restore it, or remove it") from error
    if not isinstance(starts, list) or not all(isinstance(start, dict) for start in starts):
        raise UserError(f"{path} is no list of objects; restore it, or remove it")
    return starts


def append_start(folder: Path, start: Start) -> None:
    """Add a start to the run's record. What was there stays, unread where it is damaged: training needs none of it."""
    path = folder / FILE
    try:
        starts = read_starts(folder)
    except UserError:
        os.replace(path, f"{path}.damaged")
        starts = []
    write_atomically(path, (json.dumps([*starts, start], indent=1) + "\n").encode())


def gather_hosts(world: Group, device: torch.device) -> dict[str, dict[str, list[Any]]]:
    """Ranks and devices of each host by name, on every rank (which all call this)."""
    hosts: dict[str, dict[str, list[Any]]] = {}
    for rank, (host, name) in enumerate(gather_objects((socket.gethostname(), device_name(device)), world)):
        entry = hosts.setdefault(host, {"ranks": [], "devices": []})
        entry["ranks"].append(rank)
        entry["devices"].append(name)
    return hosts


def device_name(device: torch.device) -> str:
    """What its maker calls a GPU; 'cpu'."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def surroundings() -> Start:
    """What of a start depends on the machine, the installation and the command, not on the run's session."""
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": [sys.executable, *sys.argv],
        "working_directory": str(Path.cwd()),
        "versions": _versions(),
        "git": {
            "megazebra": git_state(Path(megazebra.__file__).parent),
            "working_directory": git_state(Path.cwd()),
        },
        "determinism": {
            "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
            "cudnn_deterministic": torch.backends.cudnn.deterministic,
            "cudnn_benchmark": torch.backends.cudnn.benchmark,
            "float32_matmul_precision": torch.get_float32_matmul_precision(),
            "threads": torch.get_num_threads(),
        },
        "environment": {
            name: value
            for name, value in sorted(os.environ.items())
            if _VARIABLES.fullmatch(name) and not _SECRET.search(name)
        },
    }


def origin_of(weights: Weights | None) -> dict[str, str] | None:
    """A folder of initial weights, and a hash that tells it from others: of its list of files and their checksums."""
    if weights is None:
        return None
    files = (weights.folder / name for name in ("checksums.json", "index.json"))
    content = next((file.read_bytes() for file in files if file.exists()), b"")
    return {"path": str(weights.folder), "sha256": hashlib.sha256(content).hexdigest()}


def git_state(folder: Path) -> dict[str, Any] | None:
    """The commit that `folder` is checked out at, and whether there is more than that; None outside of git.

    diff_sha256: of what differs from the commit, names of untracked files included; None where nothing does.
    """
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None:
        return None
    status = _git(folder, "status", "--porcelain")
    difference = _git(folder, "diff", "HEAD", "--no-ext-diff", "--no-textconv", "--binary")
    if status is None or difference is None:
        return {"commit": commit.decode().strip(), "dirty": None, "diff_sha256": None}
    digest = hashlib.sha256(status + b"\0" + difference).hexdigest() if status else None
    return {"commit": commit.decode().strip(), "dirty": bool(status), "diff_sha256": digest}


def _git(folder: Path, *arguments: str) -> bytes | None:
    """What git prints; None without git, outside of a checkout, or where it takes too long."""
    # A repository's own configuration may name a program to ask for changed files: it is not called.
    command = ["git", "-c", "core.fsmonitor=false", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=_GIT_TIMEOUT_S,
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "megazebra": megazebra.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
    }
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    if torch.cuda.is_available():
        found["cuda"] = torch.version.cuda
        found["cudnn"] = str(torch.backends.cudnn.version())
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found
