"""Prompts to new tokens: prefill in chunks, then one token of every row at a time.

Legend: B rows of the batch, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor

from megazebra.generate.cache import KVCache
from megazebra.generate.sampler import Sampler
from megazebra.generate.sampling import GREEDY, Sampling
from megazebra.models.zebra import ZebraModel
from megazebra.parallel.collectives import broadcast


class Generator:
    """Generates with a model; on several tensor-parallel ranks all of them make the same calls."""

    def __init__(self, model: ZebraModel) -> None:
        self.model = model

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        sampling: Sampling = GREEDY,
        eos_ids: Collection[int] = (),
        chunk: int = 2048,
    ) -> list[list[int]]:
        """The new token ids of every prompt; arguments are those of `start`."""
        generation = self.start(prompts, max_new_tokens, sampling, eos_ids, chunk)
        for _ in generation:
            pass
        return generation.tokens

    def start(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        sampling: Sampling = GREEDY,
        eos_ids: Collection[int] = (),
        chunk: int = 2048,
        first_row: int = 0,
    ) -> Generation:
        """A generation that gives tokens as they come, when it is iterated over.

        prompts: token ids, of any lengths, none empty. eos_ids: a row ends with the first of these, which is its last
        token. chunk: prompt tokens of one forward pass; changes results by rounding only. first_row: number of the
        first prompt where these are some of many; it decides which random numbers are drawn.

        Raises ValueError when an argument has no meaning or a token is not in the vocabulary.
        """
        vocab_size = self.model.model.config.vocab_size
        if not prompts or not all(prompts):
            raise ValueError("every prompt needs a token to begin with; give the model's bos token in place of nothing")
        if max_new_tokens < 1 or chunk < 1:
            raise ValueError(f"max_new_tokens={max_new_tokens} and chunk={chunk} are numbers of tokens, at least 1")
        for row, prompt in enumerate(prompts):
            if min(prompt) < 0 or max(prompt) >= vocab_size:
                raise ValueError(
                    f"prompt {row} has tokens from {min(prompt)} to {max(prompt)}, the model's go from 0 to "
                    f"{vocab_size - 1}; encode it with the model's tokenizer"
                )
        sampler = Sampler(sampling, range(first_row, first_row + len(prompts)))
        return Generation(self.model, prompts, max_new_tokens, sampler, frozenset(eos_ids), chunk)


class Generation:
    """Iterating gives, after every step, the new token of each row: None for rows that have ended.

    tokens: new ids of every row so far. prompt_lengths: in tokens. prefill_s: seconds up to the first token; decode_s:
    of the other steps together, not counting what the caller does in between. cache: its keys and values.
    """

    def __init__(
        self,
        model: ZebraModel,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        sampler: Sampler,
        eos_ids: frozenset[int],
        chunk: int,
    ) -> None:
        self.prompt_lengths = [len(prompt) for prompt in prompts]
        longest = max(self.prompt_lengths)
        padding = [longest - length for length in self.prompt_lengths]
        self.tokens: list[list[int]] = [[] for _ in prompts]
        self.prefill_s = self.decode_s = 0.0
        # The last token is not an input any more.
        self.cache = KVCache.of(model, padding, capacity=longest + max_new_tokens - 1)
        self._model = model
        self._device = model.lm_head.weight.device
        self._rows = [[0] * count + list(prompt) for count, prompt in zip(padding, prompts, strict=True)]
        self._max_new_tokens = max_new_tokens
        self._sampler = sampler
        self._eos_ids = eos_ids
        self._chunk = chunk
        self._ended = [False] * len(prompts)

    def __iter__(self) -> Iterator[list[int | None]]:
        started = time.perf_counter()
        tokens_B = self._prefill()
        new = self._taken(tokens_B)
        self.prefill_s = time.perf_counter() - started
        yield new
        while not all(self._ended):
            started = time.perf_counter()
            tokens_B = self._next(tokens_B[:, None])
            new = self._taken(tokens_B)
            self.decode_s += time.perf_counter() - started
            yield new

    @property
    def decoded_tokens(self) -> int:
        """New tokens beyond the first of every row, which prefill gives."""
        return sum(len(row) - 1 for row in self.tokens if row)

    def _prefill(self) -> Tensor:
        tokens_BS = torch.tensor(self._rows, device=self._device)
        *before, last_BC = tokens_BS.split(self._chunk, dim=1)
        for tokens_BC in before:
            self._forward(tokens_BC)
        return self._next(last_BC)

    def _next(self, tokens_BC: Tensor) -> Tensor:
        """The token after these, int64 [B], the same on every tensor-parallel rank."""
        logits_BV = self._forward(tokens_BC)[:, -1]
        # Ranks that choose alone could drift apart by a rounding error.
        tp = self._model.mesh.tp
        chosen_B = self._sampler.choose(logits_BV) if tp.rank == 0 else tokens_BC.new_empty(len(tokens_BC))
        return broadcast(chosen_B, tp, label="token")

    @torch.no_grad()
    def _forward(self, tokens_BC: Tensor) -> Tensor:
        return self._model(tokens_BC, cache=self.cache, last_only=True)

    def _taken(self, tokens_B: Tensor) -> list[int | None]:
        new: list[int | None] = []
        for row, token in enumerate(tokens_B.tolist()):
            if self._ended[row]:
                new.append(None)
                continue
            new.append(token)
            self.tokens[row].append(token)
            self._ended[row] = token in self._eos_ids or len(self.tokens[row]) == self._max_new_tokens
        return new
