"""From parts of a text to tokens, as many as fit a length. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from tokenizers import Tokenizer

from megazebra.errors import UserError
from megazebra.evaluate.recall.answers import Question


class Answer(str):
    """A part of a text that is asked for."""

    __slots__ = ()


Build = Callable[[int], Sequence[str]]


class Encoder:
    """Texts to questions.

    special_tokens: also put the tokens around a text that the tokenizer's own post-processing does, such as Llama's
    <s>. Corpora of tools/preprocess_data.py have none at their documents' beginnings.
    """

    def __init__(self, tokenizer: Tokenizer, *, special_tokens: bool = False) -> None:
        self._tokenizer = tokenizer
        self._special_tokens = special_tokens

    def question(self, parts: Sequence[str]) -> Question:
        """The parts as one text, encoded as a whole: every token with a character of an Answer is asked for."""
        encoding = self._tokenizer.encode("".join(parts), add_special_tokens=self._special_tokens)
        ends = np.cumsum([len(part) for part in parts])
        is_answer = np.zeros(len(encoding.ids), dtype=np.bool_)
        first, last = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2).T
        for part, end in zip(parts, ends.tolist(), strict=True):
            if isinstance(part, Answer):
                is_answer |= (first < end) & (last > end - len(part))
        return Question(np.array(encoding.ids, dtype=np.int64), is_answer)

    def longest(self, task: str, length: int, build: Build) -> Question:
        """The question `build(n)` of the largest n, from 0, that has at most `length` tokens.

        Raises UserError when build(0) has more.
        """
        best = self.question(build(0))
        shortest = len(best.tokens)
        if shortest > length:
            raise UserError(f"a question of {task} has at least {shortest} tokens; length {length} is too short")
        fits, too_many, tokens_each = 0, None, 8.0
        while too_many is None or too_many - fits > 1:
            # A guess from what one more has cost so far; where that is off, the bounds close in all the same.
            n = fits + max(1, int((length - len(best.tokens)) / tokens_each))
            n = n if too_many is None else min(n, too_many - 1)
            tried = self.question(build(n))
            if len(tried.tokens) <= length:
                fits, best = n, tried
            else:
                too_many = n
            tokens_each = max((len(tried.tokens) - shortest) / n, 1e-3)
        return best
