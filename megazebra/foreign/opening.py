"""A folder of another trainer's as whole weights under Hugging Face's names: which kind it is, and which model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from megazebra.checkpoint.store import CheckpointError
from megazebra.config.loading import load_config
from megazebra.config.schema import ModelConfig
from megazebra.foreign.deepspeed_zero import find_zero_folder, read_zero_folder
from megazebra.foreign.llama_names import EMBEDDING, llama_parts
from megazebra.foreign.megatron_files import find_megatron_folder, read_megatron_folder
from megazebra.foreign.megatron_names import are_megatrons, megatron_parts, with_one_spelling
from megazebra.foreign.megatron_options import model_settings, refuse_unsupported
from megazebra.foreign.shards import ForeignWeights, ShardedModel, shortened
from megazebra.hf.config_reading import model_config, read_fields


def read_foreign(path: Path) -> ShardedModel | None:
    """What DeepSpeed's ZeRO or Megatron left in a folder; None where it is neither's.

    Raises CheckpointError when it is one's and cannot be read.
    """
    for find, read in ((find_zero_folder, read_zero_folder), (find_megatron_folder, read_megatron_folder)):
        if (folder := find(path)) is not None:
            try:
                return read(folder)
            except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
                raise CheckpointError(
                    f"{folder} is laid out as no version of its trainer that we know: {error!r}"
                ) from error
    return None


def model_of(sharded: ShardedModel, source: Path | None, overrides: Sequence[str]) -> ModelConfig:
    """The configuration of the model.

    source: a YAML file of ours, or a Hugging Face folder with its config.json; None: the options that the trainer
    saved. overrides: `model.key=value` on top.
    Raises UserError for what cannot be read or represented, or when nothing says what the model is.
    """
    refuse_unsupported(sharded.options, sharded.description)
    own = ["data.seq_len=1"]  # no more than the model is asked about
    if source is not None and source.is_file():
        return load_config(source, [*own, *overrides]).model
    if source is not None:
        settings = model_config(read_fields(source)).model_dump(mode="json")
    elif sharded.options:
        settings = model_settings(sharded.options, sharded.description)
        if "vocab_size" not in settings and not any("model.vocab_size=" in override for override in overrides):
            raise CheckpointError(
                f"{sharded.description} does not say how many tokens the vocabulary has without its padding "
                f"(padded_vocab_size={sharded.options.get('padded_vocab_size')}); give --model.vocab_size"
            )
    else:
        raise CheckpointError(
            f"{sharded.description} does not say what the model is; give --model with a configuration of ours or the "
            "folder of a Hugging Face config.json"
        )
    return load_config(None, [*own, f"model={json.dumps(settings)}", *overrides]).model


def whole_weights(sharded: ShardedModel, model: ModelConfig) -> ForeignWeights:
    """Raises CheckpointError when names or shapes are not those of the model under Llama's or Megatron's names."""
    first = sharded.ranks[0]
    if EMBEDDING in first:
        return ForeignWeights(model, sharded, llama_parts(model, sharded.ranks))
    if not are_megatrons(first):
        raise CheckpointError(
            f"{sharded.description} holds weights under names that are neither Llama's nor Megatron's: "
            f"{shortened(list(first))}"
        )
    ranks = [with_one_spelling(shards) for shards in sharded.ranks]
    renamed = ShardedModel(sharded.description, ranks, sharded.options, sharded.progress)
    return ForeignWeights(model, renamed, megatron_parts(model, ranks))
