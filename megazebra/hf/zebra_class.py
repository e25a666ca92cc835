"""The class that travels with its weights, for models that no class of transformers represents.

Its source is remote_code/: not imported here, copied into the exported folder, where `auto_map` points to it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megazebra.config.schema import ModelConfig, RopeConfig
from megazebra.hf.rope import rope_parameters

_FOLDER = Path(__file__).parent / "remote_code"


def zebra_code() -> dict[str, bytes]:
    """Name and content of each file."""
    return {path.name: path.read_bytes() for path in sorted(_FOLDER.glob("*.py"))}


def zebra_fields(config: ModelConfig) -> dict[str, Any]:
    """What its config.json has beside the fields that all classes share; remote_code says what they mean."""

    def rope(of: RopeConfig) -> dict[str, Any] | None:
        return rope_parameters(of, config.head_size) if of.enabled else None

    return {
        "auto_map": {
            "AutoConfig": "configuration_zebra.ZebraConfig",
            "AutoModel": "modeling_zebra.ZebraModel",
            "AutoModelForCausalLM": "modeling_zebra.ZebraForCausalLM",
        },
        "layer_windows": [spec.window for spec in config.attention_specs()],
        "global_rope": rope(config.rope_global),
        "local_rope": rope(config.rope_local),
        "attention_sinks": config.attention_sinks,
        "attn_logit_softcapping": config.attention_softcap,
        "final_logit_softcapping": config.final_logit_softcap,
        "qk_norm": config.qk_norm,
    }
