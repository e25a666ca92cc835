"""What a cluster can do: YAML files that users may copy and edit. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError

from megazebra.config.errors import ConfigError
from megazebra.config.keys import did_you_mean, values_in_words
from megazebra.config.schema import Count, Positive, Section
from megazebra.config.yaml_source import read_settings, shown

_FOLDER = Path(__file__).parent / "profiles"
ShareAboveZero = Annotated[float, Field(gt=0, le=1)]


class Profile(Section):
    """One device and its links. Bandwidths are what one device receives."""

    peak_bf16_flops: Positive
    """Dense bf16 operations per second."""
    peak_fp32_flops: Positive
    """float32 operations per second."""
    matmul_share: ShareAboveZero
    """Share of the peak that matrix products of the model's size reach."""
    attention_share: ShareAboveZero
    """Share of the peak that attention reaches, of operations as plan/flops.py counts them."""
    memory_bytes: Positive
    """Device memory."""
    memory_reserve: Annotated[float, Field(ge=0, lt=1)]
    """Share of it left to the driver, the communication library and the allocator's gaps."""
    memory_bandwidth: Positive
    """Bytes per second that the device reads or writes."""
    devices_per_node: Count
    """Devices joined by the fast links."""
    intra_node_bandwidth: Positive
    """Bytes per second from devices of the same node."""
    inter_node_bandwidth: Positive
    """Bytes per second from other nodes."""
    latency_s: Annotated[float, Field(ge=0)]
    """Seconds that a collective costs beside its bytes."""

    def peak_flops(self, precision: str) -> float:
        return self.peak_bf16_flops if precision == "bf16" else self.peak_fp32_flops

    @property
    def usable_bytes(self) -> float:
        return self.memory_bytes * (1 - self.memory_reserve)


def profile_names() -> list[str]:
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def load_profile(name: str) -> Profile:
    """One of `profile_names`, or a YAML file with the same keys.

    Raises ConfigError with everything that is wrong at once: no such profile, no YAML, keys unknown, missing or
    of wrong values.
    """
    if name in profile_names():
        path = _FOLDER / f"{name}.yaml"
    elif name.endswith((".yaml", ".yml")):
        path = Path(name)
    else:
        known = profile_names()
        choices = f"take one of {', '.join(known)} or a .yaml file of your own{did_you_mean(name, known)}"
        raise ConfigError([f"--hardware {name}: there is no such profile; {choices}"])
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError([f"{path}: cannot be read: {error.strerror}"]) from None
    except UnicodeDecodeError:
        raise ConfigError([f"{path}: is not UTF-8; save the file as UTF-8"]) from None
    return _checked(text, str(path))


def _checked(text: str, path: str) -> Profile:
    settings = {setting.key: setting for setting in read_settings(text, path, lambda key: False)}
    problems = [f"{s.source}: {s.key}: {s.problem}" for s in settings.values() if s.problem]
    values: dict[str, Any] = {key: setting.value for key, setting in settings.items()}
    try:
        if not problems:
            return Profile.model_validate(values, strict=True)
    except ValidationError as error:
        for detail in error.errors(include_url=False):
            key = str(detail["loc"][0])
            if detail["type"] == "missing":
                problems.append(f"{path}: {key} is missing: {Profile.model_fields[key].description}")
            elif detail["type"] == "extra_forbidden":
                source = settings[key].source
                problems.append(f"{source}: unknown key {key!r}{did_you_mean(key, Profile.model_fields)}")
            else:
                allowed = values_in_words(Profile, key)
                problems.append(f"{settings[key].source}: {key}={shown(detail['input'])}: must be {allowed}")
    raise ConfigError(problems)
