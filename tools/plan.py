"""Which layout to train with: memory, traffic and speed of every way to use a number of devices.

python tools/plan.py --config examples/zebra_7b.yaml --gpus 64 --hardware h100 --data.seq_len=131072

Layouts vary parallel.tensor (with sequence parallelism), parallel.context, parallel.zero_stage, train.recompute and
train.micro_batch_size; a key that is given on the command line stays as it is given. Nothing runs: bytes received are
exact (tests count the same), memory is right to a few percent where it was measured (--check measures on this CPU), and
times follow from the hardware's profile, calibrated on published runs of another trainer; megazebra/plan says how.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from megazebra.config import load_config, parse_command_line
from megazebra.config.stages import one_stage
from megazebra.durable import write_atomically
from megazebra.launch import readable_errors
from megazebra.plan.layouts import Judgement, best, layouts, ranked
from megazebra.plan.profile import Profile, load_profile, profile_names

GB = 1e9


def main() -> None:
    own, rest = arguments(sys.argv[1:])
    if own.check:
        check()
        return
    command = parse_command_line(rest)
    config = one_stage(load_config(command.config_path, command.overrides), command.stage)
    profile = load_profile(own.hardware)
    pinned = [override.partition("=")[0].removeprefix(f"stages.{command.stage}.") for override in command.overrides]
    judged = list(layouts(config, own.gpus, profile, pinned))
    rows = ranked(judged)
    recommended = best(judged)
    print(*introduction(own.gpus, own.hardware, profile, rows), sep="\n")
    print(*table(rows, profile, own.rows), sep="\n")
    print(*recommendation(recommended, rows, profile), sep="\n")
    if own.json:
        write_atomically(own.json, (json.dumps([as_json(row, profile) for row in rows], indent=1) + "\n").encode())


def arguments(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The tool's own, and what remains for the configuration."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        epilog="All keys of a configuration can be set as for pretrain_zebra.py: --section.key=value.",
    )
    parser.add_argument("--gpus", type=int, default=8, help="devices in all (8)")
    parser.add_argument("--hardware", default="h100", help=f"{', '.join(profile_names())}, or a YAML file like those")
    parser.add_argument("--rows", type=int, default=20, help="layouts that are printed, of those that fit (20)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all layouts")
    parser.add_argument("--check", action="store_true", help="measure memory of small layouts here, beside the plan")
    own, rest = parser.parse_known_args(argv)
    if own.gpus < 1:
        parser.error(f"--gpus {own.gpus}: must be at least 1")
    return own, rest


def introduction(devices: int, hardware: str, profile: Profile, rows: Sequence[Judgement]) -> Iterator[str]:
    config = rows[0].config
    yield (
        f"{devices} x {hardware}, {profile.devices_per_node} to a node; {config.train.global_batch_size} sequences of "
        f"{config.data.seq_len:,} tokens a step, {config.train.precision}; "
        f"{profile.usable_bytes / GB:,.1f} of {profile.memory_bytes / GB:,.1f} GB of memory usable"
    )
    fitting = sum(row.fits for row in rows)
    yield f"{fitting} of {len(rows)} layouts fit; memory in GB at its peak, GB received by a rank and step\n"


COLUMNS = (
    *(
        "tp",
        "cp",
        "dp",
        "zero",
        "micro",
        "recompute",
        "memory",
        "weights",
        "grads",
        "optim",
        "activ",
        "loss",
        "buffers",
    ),
    *("intra", "inter", "step s", "tokens/s", "MFU"),
)


def table(rows: Sequence[Judgement], profile: Profile, most: int) -> Iterator[str]:
    fitting = [row for row in rows if row.fits][:most]
    if fitting:
        yield from aligned([COLUMNS, *(cells(row, profile) for row in fitting)])
    refused = [row for row in rows if not row.fits]
    if refused:
        yield "\nThese don't fit:"
        yield from aligned([("tp", "cp", "dp", "why"), *refusals(refused)])


def cells(row: Judgement, profile: Profile) -> tuple[str, ...]:
    assert row.memory is not None
    assert row.time is not None
    parts = (row.memory.weights, row.memory.gradients, row.memory.optimizer, row.memory.activations, row.memory.loss)
    links = row.received(profile)
    return (
        *_name(row),
        *(f"{size / GB:,.1f}" for size in (row.memory.total, *parts, row.memory.buffers)),
        *(f"{links[link] / GB:,.2f}" for link in ("intra", "inter")),
        f"{row.time.total:,.2f}",
        f"{row.tokens_per_s:,.0f}",
        f"{row.mfu(profile):.1%}",
    )


def _name(row: Judgement) -> tuple[str, ...]:
    parallel, train = row.config.parallel, row.config.train
    sizes = (parallel.tensor, parallel.context, row.data_parallel, parallel.zero_stage, train.micro_batch_size)
    return (*map(str, sizes), train.recompute)


def refusals(rows: Iterable[Judgement]) -> Iterator[tuple[str, ...]]:
    """One line for every split of the devices: a reason, or by ZeRO stage and recomputation how much memory lacks."""
    reasons: dict[tuple[str, ...], dict[str, None]] = {}  # a dict keeps the order
    for row in rows:
        *sizes, stage, _, recompute = _name(row)
        why = str(row.refusal)
        if row.memory is not None:
            why = f"ZeRO {stage} {recompute} {why}"
        reasons.setdefault(tuple(sizes), {})[why] = None
    for split, whys in reasons.items():
        first, *others = whys
        yield (*split, "; ".join([first, *(other.replace("memory over by ", "") for other in others)]))


def aligned(lines: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        *numbers, last = line
        right = (cell.rjust(width) for cell, width in zip(numbers, widths, strict=False))
        yield "  ".join((*right, last.rjust(widths[-1]) if widths[-1] < 12 else last)).rstrip()


def recommendation(chosen: Judgement | None, rows: Sequence[Judgement], profile: Profile) -> Iterator[str]:
    if chosen is None:
        closest = min((row for row in rows if row.memory), key=lambda row: row.memory.total, default=None)  # type: ignore[union-attr]
        yield "\nNo layout fits; use more devices, or shorten data.seq_len"
        if closest is not None:
            yield f"closest: {closest.refusal} with {closest.overrides()}"
        return
    assert chosen.time is not None
    yield f"\nRecommended: {chosen.tokens_per_s:,.0f} tokens/s, {chosen.mfu(profile):.1%} MFU"
    yield f"  {chosen.overrides()}"
    time = chosen.time
    shares = {
        "products": time.products, "attention": time.attention, "element-wise": time.elementwise,
        "update": time.update, "waiting for traffic": time.waiting,
    }  # fmt: skip
    yield "  a step: " + ", ".join(f"{name} {seconds / time.total:.0%}" for name, seconds in shares.items())
    groups = {name: size for name, size in chosen.received_by_group().items() if size >= 1e6}
    if groups:
        yield "  received by a rank in a step: " + ", ".join(
            f"{name} {size / GB:,.2f} GB" for name, size in groups.items()
        )


def as_json(row: Judgement, profile: Profile) -> dict[str, Any]:
    names = ("tensor", "context", "data", "zero_stage", "micro_batch_size", "recompute")
    found: dict[str, Any] = dict(zip(names, _name(row), strict=True))
    found = {name: int(value) if value.isdigit() else value for name, value in found.items()}
    found |= {"fits": row.fits, "refusal": row.refusal, "overrides": row.overrides()}
    if row.memory is not None:
        found["memory_bytes"] = {**vars(row.memory), "total": row.memory.total}
    if row.time is not None:
        found |= {
            "received_bytes": row.received(profile),
            "received_bytes_by_group": row.received_by_group(),
            "step_s": {**vars(row.time), "total": row.time.total},
            "tokens_per_s": row.tokens_per_s,
            "mfu": row.mfu(profile),
        }
    return found


def check() -> None:
    from bench.plan_check import LAYOUTS, compare  # brings torch and DeepSpeed

    print(f"{'peak memory, MiB':36}{'planned':>10}{'measured':>10}")
    for each in compare(list(LAYOUTS)):
        planned, measured = each.predicted / 2**20, each.measured / 2**20
        print(f"{each.name:36}{planned:>10,.0f}{measured:>10,.0f}{planned / measured - 1:>+8.1%}", flush=True)


if __name__ == "__main__":
    with readable_errors():
        main()
