"""Recall tasks of bare token ids, for tiny models that are trained on nothing else.

Two ids are marks and the others halves of the vocabulary: symbols, of which keys and answers are made, and filler.
A model that guesses among the symbols is right once in `len(symbols)`. Every question has exactly `length` tokens.
"""

from __future__ import annotations

import math
from functools import partial

import numpy as np
from numpy.typing import NDArray

from megazebra.errors import UserError
from megazebra.evaluate.recall.answers import Question, Task

BEGIN, ASK = 0, 1  # marks: what is to be remembered begins; now it is asked for
PASSKEY_TOKENS = 4
VALUE_TOKENS = 2
COPIED_TOKENS = 32
SMALLEST_VOCABULARY = 8


class Alphabet:
    """The roles of the ids below `vocab_size`: 0 and 1 are marks, then come the symbols, then filler.

    Raises UserError below 8 ids.
    """

    def __init__(self, vocab_size: int) -> None:
        if vocab_size < SMALLEST_VOCABULARY:
            raise UserError(f"token-level tasks need a vocabulary of {SMALLEST_VOCABULARY} ids, not {vocab_size}")
        middle = 2 + (vocab_size - 2) // 2
        self.symbols = range(2, middle)
        self.filler = range(middle, vocab_size)

    def draw_symbols(self, random: np.random.Generator, count: int) -> NDArray[np.int64]:
        return random.integers(self.symbols.start, self.symbols.stop, count)

    def draw_filler(self, random: np.random.Generator, count: int) -> NDArray[np.int64]:
        return random.integers(self.filler.start, self.filler.stop, count)

    def symbols_for(self, variants: int) -> int:
        """How many symbols tell that many things apart."""
        return max(1, math.ceil(math.log(variants) / math.log(len(self.symbols))))


def token_tasks(vocab_size: int) -> dict[str, Task]:
    """The tasks by name: passkey, kv and copy. Raises UserError below 8 ids."""
    alphabet = Alphabet(vocab_size)
    tasks = {"passkey": passkey, "kv": key_value, "copy": copy}
    return {name: partial(task, alphabet) for name, task in tasks.items()}


def passkey(alphabet: Alphabet, random: np.random.Generator, length: int, depth: float) -> Question:
    """filler BEGIN key filler ASK | key: four symbols hidden in filler (after Mohtashami and Jaggi 2023)."""
    key = alphabet.draw_symbols(random, PASSKEY_TOKENS)
    needle = np.concatenate([[BEGIN], key])
    text = alphabet.draw_filler(random, _room("passkey", length, len(needle) + 1 + len(key)) + len(needle))
    start = _place(len(text) - len(needle), depth)
    text[start : start + len(needle)] = needle
    return _question([text, [ASK]], key)


def key_value(alphabet: Alphabet, random: np.random.Generator, length: int, depth: float) -> Question:
    """pairs BEGIN key value, end to end, ASK key | value: keys are all different, the pair at `depth` is asked for.

    The key has as many symbols as four times the pairs need; filler stands before the first pair where room is left.
    """
    size = _pair_size(alphabet, length)
    key_size = size - 1 - VALUE_TOKENS
    pairs, left = divmod(_room("kv", length, size + 1 + key_size + VALUE_TOKENS) + size, size)
    numbers = random.choice(len(alphabet.symbols) ** key_size, pairs, replace=False)
    digits = numbers[:, None] // len(alphabet.symbols) ** np.arange(key_size) % len(alphabet.symbols)
    keys = alphabet.symbols.start + digits
    values = alphabet.draw_symbols(random, pairs * VALUE_TOKENS).reshape(pairs, VALUE_TOKENS)
    text = np.concatenate([np.full((pairs, 1), BEGIN), keys, values], axis=1).ravel()
    chosen = _place(pairs - 1, depth)
    return _question([alphabet.draw_filler(random, left), text, [ASK], keys[chosen]], values[chosen])


def copy(alphabet: Alphabet, random: np.random.Generator, length: int, depth: float) -> Question:
    """symbols, ASK, some of them in turn | those that follow: 32, or a quarter of the length where that is less.

    The passage to go on with begins at `depth`; its first symbols are so many that they hardly occur a second time.
    """
    copied = max(1, min(COPIED_TOKENS, length // 4))
    cue = alphabet.symbols_for(1000 * length)
    text = alphabet.draw_symbols(random, _room("copy", length, 2 * (cue + copied) + 1) + cue + copied)
    start = _place(len(text) - cue - copied, depth)
    passage = text[start : start + cue + copied]
    return _question([text, [ASK], passage[:cue]], passage[cue:])


def _pair_size(alphabet: Alphabet, length: int) -> int:
    """Tokens of a pair; longer keys leave room for fewer pairs, so the shortest that tell enough apart are taken."""
    key_size = 1
    while len(alphabet.symbols) ** key_size < 4 * length / (1 + key_size + VALUE_TOKENS):
        key_size += 1
    return 1 + key_size + VALUE_TOKENS


def _room(task: str, length: int, least: int) -> int:
    """Tokens beyond the shortest question. Raises UserError when not even that fits."""
    if length < least:
        raise UserError(f"a question of {task} has at least {least} tokens; length {length} is too short")
    return length - least


def _place(last: int, depth: float) -> int:
    return round(last * depth)


def _question(text: list[NDArray[np.int64] | list[int]], answer: NDArray[np.int64]) -> Question:
    tokens = np.concatenate([*text, answer]).astype(np.int64)
    return Question(tokens, np.arange(len(tokens)) >= len(tokens) - len(answer))
