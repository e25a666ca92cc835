"""Lengths of texts, in characters or in the tokens of a tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer


class Ruler(Protocol):
    """unit: what it counts, in the plural."""

    @property
    def unit(self) -> str: ...

    def length(self, text: str) -> int: ...

    def units(self, text: str, places: Sequence[int]) -> list[int]:
        """For places in `text`, given in characters, the units that end there or before."""
        ...

    def places(self, text: str, units: Sequence[int]) -> list[int]:
        """The other way round: the characters that so many units from the beginning of `text` take."""
        ...


class CharacterRuler:
    unit = "characters"

    def length(self, text: str) -> int:
        return len(text)

    def units(self, text: str, places: Sequence[int]) -> list[int]:
        return list(places)

    def places(self, text: str, units: Sequence[int]) -> list[int]:
        return [min(max(0, count), len(text)) for count in units]


class TokenRuler:
    unit = "tokens"

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def length(self, text: str) -> int:
        return len(self._ends(text))

    def units(self, text: str, places: Sequence[int]) -> list[int]:
        found: list[int] = np.searchsorted(self._ends(text), places, side="right").tolist()
        return found

    def places(self, text: str, units: Sequence[int]) -> list[int]:
        ends = np.concatenate([[0], self._ends(text)])
        found: list[int] = ends[np.clip(units, 0, len(ends) - 1)].tolist()
        return found

    def _ends(self, text: str) -> NDArray[np.int64]:
        offsets = self._tokenizer.encode(text, add_special_tokens=False).offsets
        return np.array([end for _, end in offsets], dtype=np.int64)
