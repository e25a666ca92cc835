"""The table of a step's parts: every part of the model is in it, and the shares add up."""

from __future__ import annotations

import re

import pytest
from support.command_line import ROOT, run_alone

PARTS = {
    "attention, global layers", "attention, local layers", "attention, projections", "MLP, projections",
    "MLP, SwiGLU product", "output layer, loss", "embedding", "RMSNorm", "RoPE", "optimizer", "the rest",
}  # fmt: skip
SETTINGS = [
    "--model.num_layers=4", "--model.hidden_size=32", "--model.ffn_hidden_size=64", "--model.num_attention_heads=4",
    "--model.num_kv_heads=2", "--model.vocab_size=64", "--model.window=16", "--data.seq_len=64",
    "--train.precision=fp32", "--train.micro_batch_size=2", "--train.global_batch_size=4",
]  # fmt: skip


def test_every_part_is_in_the_table() -> None:
    tool = str(ROOT / "tools" / "profile_step.py")
    # Recomputed blocks run forward within backward: parts within parts.
    run = run_alone(tool, *SETTINGS, "--train.recompute=full")
    assert run.returncode == 0, run.stderr
    rows = re.findall(r"^(\S.*?) +([\d,.]+) ms +([\d.]+)%$", run.stdout, re.MULTILINE)
    assert {part for part, _, _ in rows} == PARTS
    # Each share is rounded to a tenth of a percent.
    assert sum(float(share) for _, _, share in rows) == pytest.approx(100, abs=len(PARTS) * 0.05)
    step = re.search(r"^a step +([\d,.]+) ms$", run.stdout, re.MULTILINE)
    assert step is not None
    assert sum(_number(ms) for _, ms, _ in rows) == pytest.approx(_number(step[1]), abs=(len(PARTS) + 1) * 0.05)


def test_an_unknown_key_is_a_message() -> None:
    run = run_alone(str(ROOT / "tools" / "profile_step.py"), "--train.compil=true")
    assert run.returncode != 0
    assert "did you mean" in run.stderr
    assert "Traceback" not in run.stderr


def _number(text: str) -> float:
    return float(text.replace(",", ""))
