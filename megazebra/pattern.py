"""Which layer attends how: the pattern is expanded once, here, and everything else reads the result.

Imports no torch: the configuration, the FLOP count and the planner read it before any device exists.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megazebra.config.schema import RopeConfig

Pattern = str | Sequence[str | int]


@dataclass(frozen=True)
class AttentionSpec:
    """How one layer attends.

    window: number of keys a query sees, itself included (Hugging Face's `sliding_window`; flash-attn's
        `left` is `window - 1`); None in a global layer, which sees every key before it.
    rope: rotary embedding of this layer's queries and keys.
    sinks: each query head has a learned logit that joins the softmax without a value (gpt-oss).
    softcap: logits s become `softcap * tanh(s / softcap)` before the mask (Gemma 2); None leaves them.
    context: how it reaches keys on other context-parallel ranks, a file of megazebra/context; 'single' has no others.
    """

    window: int | None
    rope: RopeConfig
    sinks: bool = False
    softcap: float | None = None
    context: str = "single"

    @property
    def is_local(self) -> bool:
        return self.window is not None

    @property
    def kind(self) -> str:
        """'local' or 'global', as metrics, traffic labels and tables name it."""
        return "local" if self.is_local else "global"


def pattern_symbols(pattern: Pattern, num_layers: int) -> tuple[str | int, ...]:
    """One symbol per layer: 'G', 'L', or a window of its own (an integer).

    A string is tiled over the layers (the last group may be cut short, as in Gemma 3's 26 layers of
    LLLLLG); a list names every layer.

    Raises ValueError when the pattern is empty, has other symbols, is a string longer than the layers,
    or a list of another length than `num_layers`.
    """
    if len(pattern) == 0:
        raise ValueError("is empty; write one symbol per layer of a group, such as 'GLLL'")
    for position, symbol in enumerate(pattern):
        is_window = isinstance(symbol, int) and not isinstance(symbol, bool) and not isinstance(pattern, str)
        if is_window and symbol < 1:  # type: ignore[operator]
            raise ValueError(f"has window {symbol} at position {position}; a window counts the query itself, so >= 1")
        if not is_window and symbol not in ("G", "L"):
            raise ValueError(
                f"has {symbol!r} at position {position}; use 'G' (global) and 'L' (local), "
                "or in a list also an integer (a window of its own)"
            )
    if isinstance(pattern, str):
        if len(pattern) > num_layers:
            raise ValueError(
                f"has {len(pattern)} symbols but the model has num_layers={num_layers}; "
                f"shorten the pattern or set num_layers >= {len(pattern)}"
            )
        return tuple(pattern[i % len(pattern)] for i in range(num_layers))
    if len(pattern) != num_layers:
        raise ValueError(
            f"lists {len(pattern)} layers but the model has num_layers={num_layers}; "
            "a list names every layer (a string is tiled)"
        )
    return tuple(pattern)


def expand_pattern(
    pattern: Pattern, num_layers: int, local: AttentionSpec, global_: AttentionSpec
) -> tuple[AttentionSpec, ...]:
    """One AttentionSpec per layer from the two kinds; an integer is `local` with that window.

    Raises ValueError as `pattern_symbols` does.
    """
    specs: list[AttentionSpec] = []
    for symbol in pattern_symbols(pattern, num_layers):
        if symbol == "G":
            specs.append(global_)
        elif symbol == "L":
            specs.append(local)
        else:
            assert isinstance(symbol, int)
            specs.append(replace(local, window=symbol))
    return tuple(specs)
