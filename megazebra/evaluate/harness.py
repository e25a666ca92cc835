"""The lm-evaluation-harness on our models: a model type `megazebra` beside its own.

python -m megazebra.evaluate.harness --model megazebra --model_args path=runs/zebra,dtype=float32 --tasks hellaswag

Takes the options of `lm_eval`, which knows no other way to find a model type that it doesn't bring. Needs the extra
`eval`. One process. The harness's --batch_size is not read: batches are filled up to `batch_tokens`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from megazebra.config.schema import ParallelConfig
from megazebra.errors import UserError
from megazebra.evaluate.cell import Example, Tally, asked
from megazebra.evaluate.results import Row
from megazebra.evaluate.scoring import DEFAULT_BATCH_TOKENS, evaluating, tally
from megazebra.generate.generator import Generator
from megazebra.generate.loading import load_model
from megazebra.generate.sampling import Sampling
from megazebra.generate.text import Text, find_tokenizer
from megazebra.parallel.mesh import ParallelMesh

Scored = tuple[float, bool]

MAX_NEW_TOKENS = 256


class _Continuations:
    """A cell of texts whose ends are scored, each for itself; given by their indices in the order of requests."""

    def __init__(self, texts: dict[int, tuple[list[int], int]]) -> None:
        """texts: by index, the tokens and how many of the last ones are scored."""
        self.indices = list(texts)
        self._texts = list(texts.values())
        self.length = max(len(tokens) for tokens, _ in self._texts) - 1  # inputs: the last token is only a label

    @property
    def samples(self) -> int:
        return len(self._texts)

    bins = samples

    def example(self, index: int) -> Example:
        tokens, scored = self._texts[index]
        return asked(np.array(tokens), np.arange(len(tokens)) >= len(tokens) - scored, index)

    def rows(self, tally: Tally) -> list[Row]:
        raise NotImplementedError("the harness makes its own tables")


@register_model("megazebra")
class MegaZebraLM(TemplateLM):
    """path: a run, one of its checkpoints or a model folder. tokenizer: a tokenizer.json or a folder with one; None:
    the model's own, else that of the run's corpus. device, dtype: None for a GPU in bfloat16 where there is one.
    max_length: tokens of a context and its continuation; None: as the model's position embedding is configured for.
    batch_tokens: of a forward pass. chunk: tokens of a forward pass over a prompt.

    Raises UserError and CheckpointError as `load_model` and `find_tokenizer` do.
    """

    def __init__(
        self,
        path: str,
        tokenizer: str | None = None,
        device: str | None = None,
        dtype: str | None = None,
        attention_backend: str = "auto",
        max_length: int | None = None,
        batch_tokens: int = DEFAULT_BATCH_TOKENS,
        chunk: int = 2048,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        self._device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        dtype = dtype or ("bfloat16" if self._device.type == "cuda" else "float32")
        if not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise UserError(f"dtype={dtype} is none of torch's; give float32 or bfloat16")
        file = find_tokenizer(Path(path), Path(tokenizer) if tokenizer else None)
        self._text = Text(file)
        if not self._text.eos_ids:
            raise UserError(f"{file.path} has no token that ends a text, which stands before texts without a context")
        self._mesh = ParallelMesh.build(ParallelConfig())
        self.model = load_model(path, self._device, getattr(torch, dtype), attention_backend, self._mesh)
        self.max_length = max_length or self.model.model.config.max_position_embeddings
        self.batch_tokens = batch_tokens
        self.chunk = chunk

    @property
    def eot_token_id(self) -> int:
        return min(self._text.eos_ids)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without a context: its own beginning where the tokenizer has one."""
        beginning = self.tok_encode("")
        return beginning[0] if beginning else self.eot_token_id

    @property
    def tokenizer_name(self) -> str:
        return type(self).__name__

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        return self._text.prompt(string, add_special_tokens)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of whole texts; those longer than max_length in windows that don't overlap."""
        windows, owners = [], []
        for owner, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, 1):
                windows.append(("", *make_disjoint_window(window)))
                owners.append(owner)
        scored = self._loglikelihood_tokens(windows)
        return np.bincount(owners, [likelihood for likelihood, _ in scored], len(requests)).tolist()

    def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[Scored]:
        """Requests (text, context ids, continuation ids); of those too long the beginning is cut off."""
        found: list[Scored] = [(0.0, True)] * len(requests)
        with evaluating(self.model):
            for cell in self._cells(requests):
                sums = tally(self.model, self._mesh, self._device, cell, self.batch_tokens)
                for index, tokens, loss, hits in zip(cell.indices, *sums, strict=True):
                    found[index] = -float(loss), bool(hits == tokens)
        return found

    def _cells(self, requests: Sequence[Any]) -> Iterator[_Continuations]:
        """Texts of about the same length together, the longest first.

        Rotary embeddings that look at the length see that of the cell: longrope's texts on either side of the original
        length are apart, so that none depends on what else is asked.
        """
        originals = {
            spec.rope.original_max_position_embeddings or 0
            for spec in self.model.model.specs
            if spec.rope.scaling == "longrope"
        }
        alike: dict[tuple[int, int], dict[int, tuple[list[int], int]]] = defaultdict(dict)
        for index, (_, context, continuation) in enumerate(requests):
            if len(continuation) > self.max_length:
                raise UserError(
                    f"a continuation has {len(continuation)} tokens, max_length is {self.max_length}; raise it"
                )
            tokens = (context + continuation)[-self.max_length - 1 :]
            inputs = len(tokens) - 1
            size = inputs.bit_length(), sum(inputs > original for original in originals)
            alike[size][index] = tokens, len(continuation)
        return (_Continuations(alike[size]) for size in sorted(alike, reverse=True))

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Texts up to the first of the strings `until`, or the model's own end."""
        texts = [""] * len(requests)
        alike: dict[str, list[int]] = defaultdict(list)
        for index, request in enumerate(requests):
            alike[repr(request.args[1])].append(index)
        done = 0  # rows of all batches: a row draws its own random numbers, or repeats of a prompt would be alike
        for indices in alike.values():
            until, most, sampling = _generation(dict(requests[indices[0]].args[1]))
            prompts = {index: self._prompt(requests[index].args[0], most) for index in indices}
            waiting = sorted(indices, key=lambda index: len(prompts[index]), reverse=True)
            while waiting:
                size = max(1, self.batch_tokens // (len(prompts[waiting[0]]) + most))
                batch, waiting = waiting[:size], waiting[size:]
                generated = self._generate([prompts[index] for index in batch], until, most, sampling, done)
                done += len(batch)
                for index, text in zip(batch, generated, strict=True):
                    texts[index] = text
        return texts

    def _prompt(self, context: str, most: int) -> list[int]:
        """The end of a context that leaves room for `most` tokens."""
        room = self.max_length - most
        if room < 1:
            raise UserError(f"max_gen_toks={most} leaves no room for a prompt in max_length={self.max_length}")
        return self.tok_encode(context)[-room:] or [self.prefix_token_id]

    def _generate(
        self, prompts: list[list[int]], until: list[str], most: int, sampling: Sampling, first_row: int
    ) -> list[str]:
        generation = Generator(self.model).start(prompts, most, sampling, self._text.eos_ids, self.chunk, first_row)
        texts = [""] * len(prompts)
        stopped = [False] * len(prompts)
        for _ in generation:
            for row, tokens in enumerate(generation.tokens):
                if not stopped[row]:
                    whole = self._text.decode(tokens)
                    ends = [place for stop in until if (place := whole.find(stop)) >= 0]
                    stopped[row] = bool(ends)
                    texts[row] = whole[: min(ends)] if ends else whole
            if all(stopped):
                break
        return texts


def _generation(options: dict[str, Any]) -> tuple[list[str], int, Sampling]:
    """The harness's generation options: what ends a text, how many tokens it has at most, how they are chosen."""
    until = options.pop("until", None) or []
    most = int(options.pop("max_gen_toks", None) or options.pop("max_new_tokens", None) or MAX_NEW_TOKENS)
    drawn = options.pop("do_sample", True)
    temperature = float(options.pop("temperature", 0.0))
    sampling = Sampling(
        temperature=temperature if drawn else 0.0,
        top_p=float(options.pop("top_p", 1.0)),
        top_k=options.pop("top_k", None),
    )
    if options:
        raise UserError(f"generation options {', '.join(options)} are not known here; leave them out (--gen_kwargs)")
    return [until] if isinstance(until, str) else list(until), most, sampling


def main() -> None:
    from lm_eval.__main__ import cli_evaluate

    from megazebra.launch import readable_errors

    with readable_errors():
        cli_evaluate()


if __name__ == "__main__":
    main()
