"""The bench counts what the formulas say, times two ranks in turns, and goes without a link where there can be none."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import bench_context
import pytest
import torch
from bench import context_link
from bench.context_bytes import count
from bench.context_link import End, LinkRefusedError, slow_link
from bench.context_rank import Setting, check_same, run_ranks
from bench_context import ByteSetting, bench_bytes, bench_time, time_rows

from megazebra.config.schema import ModelConfig, RopeConfig
from megazebra.context.choice import layer_shape, resolve_specs
from megazebra.context.traffic import Received, Shape, received
from megazebra.pattern import AttentionSpec

TOOL = Path(__file__).parents[2] / "tools" / "bench_context.py"
BYTES = ByteSetting(
    seq_len=256,
    lengths=(128, 256),
    ranks=4,
    model=ModelConfig(num_layers=4, hidden_size=64, num_attention_heads=8, num_kv_heads=2, window=33),
)
TIME = Setting(lengths=(1024,), heads=2, head_dim=32, window=32, rounds=1, backend="blocked")


def test_counted_bytes_are_the_formulas() -> None:
    config = BYTES.config(256)
    specs, shape = resolve_specs(config), layer_shape(config)
    assert [spec.context for spec in specs] == ["ulysses", "halo", "halo", "halo"]
    for layers in (specs, [replace(spec, context="allgather") for spec in specs]):
        for rank in range(4):
            expected = [received(spec.context, spec, shape, rank) for spec in layers]
            assert count(layers, shape, rank) == expected, f"rank {rank}"


def test_ratios_of_bytes() -> None:
    config = BYTES.config(256)
    specs, shape = resolve_specs(config), layer_shape(config)

    def of_busiest(layers: Sequence[AttentionSpec]) -> list[Received]:
        ranks = [[received(spec.context, spec, shape, rank) for spec in layers] for rank in range(4)]
        return max(ranks, key=lambda rank: sum(layer.total for layer in rank))

    ours, theirs = of_busiest(specs), of_busiest([replace(spec, context="allgather") for spec in specs])
    numbers = {key: number for key, number, _ in bench_bytes(BYTES)}
    assert numbers == {
        "comm_bytes_vs_allgather": sum(x.total for x in theirs) / sum(x.total for x in ours),
        "comm_bytes_vs_allgather_fwd": sum(x.forward for x in theirs) / sum(x.forward for x in ours),
        "halo_bytes_over_formula": 1,
    }


def test_a_halo_that_is_not_the_formula_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    def one_key_more(specs: Sequence[AttentionSpec], shape: Shape, rank: int) -> list[Received]:
        wider = [replace(spec, window=spec.window and spec.window + 1) for spec in specs]
        return count(wider, shape, rank)

    monkeypatch.setattr(bench_context, "count", one_key_more)
    numbers = {key: number for key, number, _ in bench_bytes(BYTES)}
    assert numbers["halo_bytes_over_formula"] == pytest.approx(33 / 32)


def test_two_ranks_in_turns() -> None:
    results = run_ranks(TIME, [End(), End()])
    numbers = {key: number for key, number, _ in time_rows(results)}
    ratios = {"comm_time_vs_allgather_1k", "layer_time_vs_allgather_1k"}
    assert set(numbers) == ratios | {"link_gbit_per_s", "halo_overlap_1k"}
    assert all(number > 0 for number in numbers.values())
    sides = [result.sides[1024] for result in results]
    exchange = max(side["allgather exchange"].seconds for side in sides) / max(
        side["halo exchange"].seconds for side in sides
    )
    assert numbers["comm_time_vs_allgather_1k"] == pytest.approx(exchange)
    spec = AttentionSpec(window=TIME.window, rope=RopeConfig())
    for rank, side in enumerate(sides):
        for name in ("halo", "allgather"):
            expected = received(name, spec, TIME.shape(1024), rank).total
            assert side[name].counted == side[f"{name} exchange"].counted == expected, name
        assert side["kernel"].counted == 0


def test_sides_that_differ_are_not_timed() -> None:
    same = [torch.ones(4)] * 4
    check_same(same, same)
    with pytest.raises(SystemExit, match="dk differs"):
        check_same(same, [*same[:2], torch.tensor([1, 1, 1, 1.001]), same[3]])


def test_a_rank_that_fails_ends_the_bench(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="a rank failed"):
        run_ranks(replace(TIME, backend="flash"), [End(), End()])
    assert "'flash' was asked for" in capfd.readouterr().err


@pytest.fixture
def refusing(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """`ip` is there, makes one namespace and refuses the next; gives what it was asked."""
    asked: list[list[str]] = []

    def run(command: Sequence[str], **_: object) -> SimpleNamespace:
        asked.append(list(command))
        refused = len(asked) > 1
        return SimpleNamespace(returncode=int(refused), stderr="Operation not permitted\n" if refused else "")

    monkeypatch.setattr(shutil, "which", lambda tool: f"/sbin/{tool}")
    monkeypatch.setattr(context_link.subprocess, "run", run)
    return asked


def test_refused_namespaces_leave_the_bench_out(refusing: list[list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    assert list(bench_time(TIME, "1gbit")) == []
    printed = capsys.readouterr().out
    assert "left out" in printed
    assert "Operation not permitted" in printed
    made = refusing[0][-1]
    assert [command[:3] for command in refusing] == [["ip", "netns", "add"]] * 2 + [["ip", "netns", "delete"]]
    assert refusing[-1][-1] == made, "the one that was made is gone again"


def test_missing_programs_leave_the_bench_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "which", lambda tool: None if tool == "tc" else f"/sbin/{tool}")
    assert list(bench_time(TIME, "1gbit")) == []
    assert "tc not found; on Debian, apt-get install iproute2" in capsys.readouterr().out


def test_namespaces_go_whatever_happens() -> None:
    try:
        with slow_link("1gbit") as ends:
            for end in ends:
                assert "rate 1Gbit" in subprocess.check_output([*end.command, "tc", "qdisc"], text=True)
                assert str(end.interface) in subprocess.check_output([*end.command, "ip", "link"], text=True)
            raise KeyboardInterrupt
    except LinkRefusedError as refused:
        pytest.skip(str(refused))
    except KeyboardInterrupt:
        pass
    left = subprocess.check_output(["ip", "netns", "list"], text=True)
    assert not any(end.command[-1] in left for end in ends)


def test_the_program(tmp_path: Path) -> None:
    target = tmp_path / "numbers.json"
    options = ["--quick", "--only=bytes", f"--json={target}"]
    subprocess.run([sys.executable, str(TOOL), *options], check=True, capture_output=True)
    numbers = json.loads(target.read_text())
    assert set(numbers) == {"comm_bytes_vs_allgather", "comm_bytes_vs_allgather_fwd", "halo_bytes_over_formula"}
    # A tenth of the bytes, and exactly the formula: counts and no timings, so they hold on every machine.
    assert numbers["comm_bytes_vs_allgather_fwd"] > 10
    assert numbers["halo_bytes_over_formula"] == 1
