"""A model folder into a Hugging Face model, of the class that is exactly this model, or with a class of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path

import torch

from megazebra.checkpoint.model_folder import ModelFolder
from megazebra.checkpoint.new_folder import new_folder
from megazebra.checkpoint.weight_files import MAX_FILE_BYTES, writing_weights
from megazebra.durable import write_synced
from megazebra.hf import companions
from megazebra.hf.config_writing import choose_family, config_json
from megazebra.hf.families import ZEBRA
from megazebra.hf.weights import NO_SINK, absent_sinks, check_weights
from megazebra.hf.zebra_class import zebra_code


class HuggingFaceExport:
    """The model in a model folder, ready to be written for transformers.

    token_ids: bos_token_id, eos_token_id, pad_token_id where the folder's generation_config.json has none or others.
    remote_code: where no class of transformers is exactly this model, write it with our own class and its code.
    config: the model. architecture: the class it becomes. needs: what loading it asks for, '' for nothing. tensors,
    bytes: of its weights. files: what travels along.
    Raises UserError when no class is exactly this model, CheckpointError when the folder is damaged.
    """

    def __init__(
        self, source: str | Path, token_ids: Mapping[str, int | None] | None = None, *, remote_code: bool = False
    ) -> None:
        self._folder = ModelFolder.open(source)
        self.config = self._folder.config
        self._family = choose_family(self.config, remote_code)
        self.architecture = self._family.architecture
        self.needs = self._needs()
        self._code = zebra_code() if self._family is ZEBRA else {}
        self._names = self._folder.names
        check_weights(self.config, {name: self._folder.shape(name) for name in self._names}, str(source))
        self.tensors, self.bytes = len(self._names), sum(map(self._bytes, self._names))
        generation = companions.generation_config(self._folder.folder)
        self._generation = companions.with_token_ids(generation, token_ids or {})
        ids = {name: self._generation.get(name) for name in companions.TOKEN_IDS}
        self._fields = config_json(self._family, self.config, ids, _name(self._dtype()))
        self._tokenizer_files = companions.tokenizer_files(self._folder.folder)
        generation_name = [companions.GENERATION_NAME] if self._generation else []
        self.files = [*self._tokenizer_files, *generation_name, *self._code]

    def write(
        self,
        target: str | Path,
        *,
        dtype: torch.dtype | None = None,
        max_file_bytes: int = MAX_FILE_BYTES,
        on_write: Callable[[int], None] = lambda _: None,
    ) -> None:
        """Write the Hugging Face folder, one tensor in memory at a time; calls `on_write` with the bytes of each.

        dtype: what weights are converted to; None keeps every bit.
        Raises CheckpointError when `target` exists or a file is damaged, OSError naming the file that could not be
        written.
        """
        with new_folder(Path(target)) as folder:
            with writing_weights(folder, max_file_bytes, dtype) as weights:
                for name in self._names:
                    # Without a name for the tensor: it would live until the next one is there too.
                    weights.write(name, self._folder.tensor(name))
                    on_write(self._bytes(name))
                if self._family.sinks:
                    no_sinks = torch.full((self.config.num_attention_heads,), NO_SINK, dtype=self._dtype())
                    for name in absent_sinks(self.config):
                        weights.write(name, no_sinks)
            fields = self._fields | ({} if dtype is None else {"dtype": _name(dtype)})
            write_synced(folder / "config.json", companions.as_json(fields))
            for name, content in self._code.items():
                write_synced(folder / name, content)
            for name in self._tokenizer_files:
                write_synced(folder / name, (self._folder.folder / name).read_bytes())
            if self._generation:
                write_synced(folder / companions.GENERATION_NAME, companions.as_json(self._generation))

    def _bytes(self, name: str) -> int:
        return self._folder.dtype(name).itemsize * prod(self._folder.shape(name))

    def _needs(self) -> str:
        if self._family is ZEBRA:
            return "trust_remote_code=True"
        return "" if self._family.since == "5.0" else f"transformers {self._family.since} or newer"

    def _dtype(self) -> torch.dtype:
        """The one that most of the weights' elements have."""
        elements: dict[torch.dtype, int] = {}
        for name in self._names:
            dtype = self._folder.dtype(name)
            elements[dtype] = elements.get(dtype, 0) + prod(self._folder.shape(name))
        return max(elements, key=lambda dtype: elements[dtype])


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
