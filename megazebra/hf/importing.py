"""A Hugging Face model into a model folder, any class of `families.py`, with a pattern of its own or another."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from pathlib import Path

import torch

from megazebra.checkpoint.model_folder import ModelFolderWriter
from megazebra.checkpoint.store import CheckpointError
from megazebra.checkpoint.tensor_file import StoredTensor
from megazebra.checkpoint.weight_files import MAX_FILE_BYTES, find_weights
from megazebra.errors import UserError
from megazebra.hf import companions
from megazebra.hf.config_reading import family_of, model_config, read_fields
from megazebra.hf.weights import EMBEDDING, NO_SINK, OUTPUT, SINKS, check_weights, equal, layer_of


class HuggingFaceImport:
    """The model in a folder, ready to be written as a model folder.

    pattern, window: replace the model's own; None keeps them.
    config: of the model as it will be. architecture: the class it comes from. tensors, bytes: of its weights.
    files: what travels along.
    Raises UserError for an option that we cannot represent, CheckpointError for weights that do not fit it.
    """

    def __init__(self, source: str | Path, pattern: str | None = None, window: int | None = None) -> None:
        self.source = Path(source)
        fields = read_fields(self.source)
        family = family_of(fields)
        self.architecture = family.architecture
        weights = self._stored_weights(drop_absent_sinks=family.sinks)
        sinks = [layer_of(name) for name in weights if name.endswith(SINKS)]
        try:
            self.config = model_config(fields, pattern, window, sinks)
        except UserError as error:
            raise UserError(f"{self.source / 'config.json'}: {error}") from error
        self._weights = self._own_weights(weights)
        self.tensors = len(self._weights)
        self.bytes = sum(map(_bytes, self._weights.values()))
        self._tokenizer_files = companions.tokenizer_files(self.source)
        generation = companions.generation_config(self.source)
        # Older models have the ids in config.json only.
        self._generation = companions.with_token_ids({}, fields) | generation
        self.files = [*self._tokenizer_files, *([companions.GENERATION_NAME] if self._generation else [])]

    def write(
        self,
        target: str | Path,
        *,
        dtype: torch.dtype | None = None,
        max_file_bytes: int = MAX_FILE_BYTES,
        on_write: Callable[[int], None] = lambda _: None,
    ) -> None:
        """Write the model folder, one tensor in memory at a time; calls `on_write` with the bytes of each.

        dtype: what weights are converted to; None keeps every bit.
        Raises CheckpointError when `target` exists, OSError naming the file when one cannot be read or written.
        """
        with ModelFolderWriter(target, self.config, max_file_bytes=max_file_bytes, dtype=dtype) as writer:
            for name, stored in self._weights.items():
                # Without a name for the tensor: it would live until the next one is there too.
                writer.write(name, stored.read(0, prod(stored.shape)).view(stored.shape))
                on_write(_bytes(stored))
            for name in self._tokenizer_files:
                writer.add_file(name, (self.source / name).read_bytes())
            if self._generation:
                writer.add_file(companions.GENERATION_NAME, companions.as_json(self._generation))

    def _stored_weights(self, *, drop_absent_sinks: bool) -> dict[str, StoredTensor]:
        weights = {}
        for name, stored in find_weights(self.source).items():
            # Files of old versions hold the rotary frequencies too, which follow from the configuration.
            if name.endswith("rotary_emb.inv_freq") or (drop_absent_sinks and _is_absent_sink(name, stored)):
                continue
            weights[name] = stored
        return weights

    def _own_weights(self, weights: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
        tied = weights.pop(OUTPUT, None) if self.config.tie_word_embeddings else None
        if tied is not None and EMBEDDING in weights and not equal(tied, weights[EMBEDDING]):
            raise CheckpointError(
                f"{self.source}: {OUTPUT} differs from {EMBEDDING}, which tie_word_embeddings=true says it is; "
                "set it to false to keep both"
            )
        check_weights(self.config, {name: stored.shape for name, stored in weights.items()}, str(self.source))
        for name, stored in weights.items():
            if not stored.dtype.is_floating_point:
                raise CheckpointError(f"{stored.file}: {name} is {stored.dtype}; quantized weights are not supported")
        return weights


def _bytes(stored: StoredTensor) -> int:
    return stored.dtype.itemsize * prod(stored.shape)


def _is_absent_sink(name: str, stored: StoredTensor) -> bool:
    # Training it further moves it no gradient, though weight decay may: anything near is as far below every logit.
    return name.endswith(SINKS) and bool((stored.read(0, prod(stored.shape)) < NO_SINK / 2).all())
