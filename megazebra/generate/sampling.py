"""How the next token is chosen: greedy, or drawn at a temperature from the likeliest tokens. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Sampling:
    """temperature: divides the logits; 0 takes the likeliest token. top_k: only so many tokens are considered; None:
    all. top_p: of these, the likeliest whose probabilities first add up to this share (Holtzman et al. 2019). seed: of
    all draws.

    Raises ValueError for a value without meaning.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature={self.temperature} divides the logits: it is at least 0 (greedy)")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} is a share of the probability: above 0, at most 1 (all tokens)")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k} is a number of tokens: at least 1, or none for all")
        if self.seed < 0:
            raise ValueError(f"seed={self.seed} is negative; choose one from 0")


GREEDY = Sampling()
