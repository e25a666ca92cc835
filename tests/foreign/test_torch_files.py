"""Files of torch.save: nothing in them is called, nothing is read but their structure."""

from __future__ import annotations

import argparse
import os
import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megazebra.checkpoint.store import CheckpointError
from megazebra.checkpoint.tensor_file import StoredTensor
from megazebra.foreign.torch_files import Inert, read_structure


class Trap:
    """What a pickle can do to who loads it."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.file}",)


def test_tensors_are_where_it_says(tmp_path: Path) -> None:
    whole = torch.arange(24, dtype=torch.float32).view(4, 6)
    torch.save(
        {
            "whole": whole,
            "rows": whole[1:3],
            "half": torch.full((3,), 0.5, dtype=torch.bfloat16),
            "list": (torch.nn.Parameter(torch.ones(2)), whole.shape, "text"),
        },
        tmp_path / "file.pt",
    )
    tree = read_structure(tmp_path / "file.pt")
    for key, expected in (("whole", whole), ("rows", whole[1:3]), ("half", torch.full((3,), 0.5).bfloat16())):
        stored = tree[key]
        assert isinstance(stored, StoredTensor)
        assert stored.shape == expected.shape
        assert stored.read(0, expected.numel()).view(expected.shape).equal(expected)
    parameter, shape, text = tree["list"]
    assert parameter.read(0, 2).tolist() == [1, 1]
    assert (shape, text) == (whole.shape, "text")


def test_what_trainers_save_beside_tensors_is_inert(tmp_path: Path) -> None:
    options = argparse.Namespace(hidden_size=32, dtype=torch.bfloat16, nested=argparse.Namespace(a=1))
    random_states = {"numpy": np.random.get_state(), "python": random.getstate(), "torch": torch.get_rng_state()}
    torch.save({"args": options, "rng_state": [random_states]}, tmp_path / "file.pt")
    found = read_structure(tmp_path / "file.pt")["args"]
    assert isinstance(found, Inert)
    assert found.state["hidden_size"] == 32
    assert found.state["dtype"] == torch.bfloat16
    assert found.state["nested"].state == {"a": 1}


def test_a_file_that_wants_more_is_refused_and_nothing_is_called(tmp_path: Path) -> None:
    caught = tmp_path / "caught"
    torch.save({"weight": torch.ones(1), "surprise": Trap(caught)}, tmp_path / "file.pt")
    with pytest.raises(CheckpointError, match=r"file.pt holds more than .*: reading it would call posix.system, which"):
        read_structure(tmp_path / "file.pt")
    with (tmp_path / "plain.pt").open("wb") as file:
        pickle.dump(Trap(caught), file)
    with pytest.raises(CheckpointError, match=r"plain.pt is damaged, or no file that torch.save"):
        read_structure(tmp_path / "plain.pt")
    assert not caught.exists()


def test_what_is_no_such_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "file.pt"
    with pytest.raises(CheckpointError, match=f"{path} is missing"):
        read_structure(path)
    torch.save({"turned": torch.ones(2, 3).t()}, path)
    with pytest.raises(CheckpointError, match=r"a tensor of shape \[3, 2\] is not contiguous"):
        read_structure(path)
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(CheckpointError, match=f"{path} is damaged"):
        read_structure(path)
    torch.save({"weight": torch.ones(3)}, path)
    path.write_bytes(path.read_bytes().replace(b"\x80\x02}q", b"\x80\x02Fq"))  # a pickle's float in place of its dict
    with pytest.raises(CheckpointError, match=f"{path} is damaged, or .*: Unsupported operand"):
        read_structure(path)
    torch.save({"weight": torch.ones(3)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=f"{path} is damaged, or no file that torch.save of version 1.6 or newer"):
        read_structure(path)
