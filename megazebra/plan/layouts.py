"""All ways to lay a run out over a number of devices, each judged: does it fit, and how fast is it. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megazebra.config.checks import check_world, cross_problems
from megazebra.config.errors import ConfigError
from megazebra.config.schema import Config
from megazebra.context.choice import resolve_specs
from megazebra.parallel.traffic import TrafficCounter
from megazebra.plan.communication import step_traffic
from megazebra.plan.memory import Memory, peak_memory
from megazebra.plan.profile import Profile
from megazebra.plan.step_time import StepTime, crosses_nodes, model_flops, step_time

# The keys that make a layout, in the order in which they vary.
KEYS = (
    "parallel.tensor",
    "parallel.context",
    "parallel.zero_stage",
    "train.recompute",
    "train.micro_batch_size",
)


@dataclass(frozen=True)
class Judgement:
    """One layout. refusal: why it can't run; all that follows is None where it isn't known then."""

    config: Config
    devices: int
    refusal: str | None
    memory: Memory | None = None
    traffic: TrafficCounter | None = None
    time: StepTime | None = None

    @property
    def fits(self) -> bool:
        return self.refusal is None

    @property
    def data_parallel(self) -> int:
        return self.devices // (self.config.parallel.tensor * self.config.parallel.context)

    @property
    def tokens_per_s(self) -> float:
        """Of all devices, padding not counted."""
        assert self.time is not None
        return self.config.train.global_batch_size * self.config.data.seq_len / self.time.total

    def mfu(self, profile: Profile) -> float:
        assert self.time is not None
        peak = profile.peak_flops(self.config.train.precision) * self.devices
        return model_flops(self.config) / self.time.total / peak

    def received(self, profile: Profile) -> dict[str, int]:
        """Bytes per step over 'intra'- and 'inter'-node links."""
        links = {"intra": 0, "inter": 0}
        for (group, _, _), tally in self.traffic.tallies.items() if self.traffic else ():
            crosses = crosses_nodes(group, self.config, self.devices, profile)
            links["inter" if crosses else "intra"] += tally.bytes
        return links

    def received_by_group(self) -> dict[str, int]:
        """Bytes per step by group; context parallelism's by kind of layer and strategy."""
        groups: dict[str, int] = {}
        for (group, kind, label), tally in self.traffic.tallies.items() if self.traffic else ():
            name = f"cp {label.split('.')[-2]} {kind}" if group == "cp" else group
            groups[name] = groups.get(name, 0) + tally.bytes
        return groups

    def overrides(self) -> str:
        """Command-line overrides that make this layout."""
        values = {key: _value(self.config, key) for key in KEYS}
        if self.config.parallel.tensor > 1:
            values["parallel.sequence_parallel"] = str(self.config.parallel.sequence_parallel).lower()
        return " ".join(f"--{key}={value}" for key, value in values.items())


def layouts(config: Config, devices: int, profile: Profile, pinned: Sequence[str] = ()) -> Iterator[Judgement]:
    """Every layout of the run on so many devices, judged. Keys in `pinned` stay as the configuration has them.

    Tensor parallelism stays within a node, with sequence parallelism unless that is pinned. Sizes are powers of two.
    """

    def sizes(key: str, most: int, divides: int) -> list[Any]:
        if key in pinned:
            return [_value(config, key)]
        powers = [1 << i for i in range(most.bit_length()) if 1 << i <= most]
        return [size for size in powers if divides % size == 0]

    def choices(key: str, values: Sequence[Any]) -> Sequence[Any]:
        return [_value(config, key)] if key in pinned else values

    stages = (1, 2, 3) if config.train.precision == "bf16" else (0, 1, 2, 3)  # bf16 runs stage 0 as 1
    for tensor in sizes("parallel.tensor", min(devices, profile.devices_per_node), devices):
        for context in sizes("parallel.context", devices // tensor or 1, devices // tensor or 1):
            rows = config.train.global_batch_size // max(1, devices // (tensor * context))
            for stage in choices("parallel.zero_stage", stages):
                for recompute in choices("train.recompute", ("none", "selective", "full")):
                    for micro_batch in sizes("train.micro_batch_size", max(1, rows), max(1, rows)):
                        values = dict(zip(KEYS, (tensor, context, stage, recompute, micro_batch), strict=True))
                        if "parallel.sequence_parallel" not in pinned:
                            values["parallel.sequence_parallel"] = tensor > 1
                        yield judge(_with(config, values), devices, profile)


def judge(config: Config, devices: int, profile: Profile) -> Judgement:
    sections = {name: getattr(config, name) for name in ("model", "parallel", "train", "data")}
    if problems := [f"{key} {message}" for key, message in cross_problems(sections)]:
        return Judgement(config, devices, problems[0])
    try:
        check_world(config, devices)
        resolve_specs(config)
    except ConfigError as error:
        return Judgement(config, devices, error.problems[0])
    except ValueError as error:
        return Judgement(config, devices, str(error))
    memory = peak_memory(config, devices)
    over = memory.total - profile.usable_bytes
    if over > 0:
        return Judgement(config, devices, f"memory over by {over / 1e9:,.1f} GB", memory)
    traffic = step_traffic(config, devices)
    return Judgement(config, devices, None, memory, traffic, step_time(config, devices, profile, traffic))


def best(judgements: Sequence[Judgement]) -> Judgement | None:
    """The fastest that fits; of equals the one with most memory to spare."""
    fitting = [each for each in judgements if each.fits]
    return min(fitting, key=_speed) if fitting else None


def ranked(judgements: Sequence[Judgement]) -> list[Judgement]:
    """Those that fit from the fastest on, one micro-batch size of each: the best. Then those that don't."""
    chosen: dict[tuple[Any, ...], Judgement] = {}
    for each in judgements:
        key = tuple(_value(each.config, name) for name in KEYS if name != "train.micro_batch_size")
        if key not in chosen or (each.fits, _speed_or_worst(each)) > (chosen[key].fits, _speed_or_worst(chosen[key])):
            chosen[key] = each
    fitting = sorted((each for each in chosen.values() if each.fits), key=_speed)
    return fitting + [each for each in chosen.values() if not each.fits]


def _speed(each: Judgement) -> tuple[float, int]:
    assert each.time is not None
    assert each.memory is not None
    return each.time.total, each.memory.total


def _speed_or_worst(each: Judgement) -> float:
    return -each.time.total if each.time is not None else 0.0


def _value(config: Config, key: str) -> Any:
    section, _, name = key.partition(".")
    return getattr(getattr(config, section), name)


def _with(config: Config, values: dict[str, Any]) -> Config:
    sections: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        section, _, name = key.partition(".")
        sections.setdefault(section, {})[name] = value
    return config.model_copy(
        update={name: getattr(config, name).model_copy(update=changes) for name, changes in sections.items()}
    )
