"""From logits to the next token.

Legend: B rows of the batch, V vocabulary.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from megazebra.generate.sampling import Sampling


class Sampler:
    """Tokens for the rows of a batch, each row with a random stream of its own: a row's tokens do not depend on which
    others are generated beside it.

    rows: the row's numbers among all prompts; they choose the streams.
    """

    def __init__(self, sampling: Sampling, rows: range) -> None:
        self.sampling = sampling
        self._streams = [np.random.default_rng([sampling.seed, row]) for row in rows]

    def choose(self, logits_BV: Tensor) -> Tensor:
        """The next token of every row, int64 [B]."""
        if self.sampling.temperature == 0:
            return logits_BV.argmax(dim=-1)
        uniform = torch.tensor([stream.random() for stream in self._streams], dtype=torch.float64)
        return draw(logits_BV, self.sampling, uniform.to(logits_BV.device))


def draw(logits_BV: Tensor, sampling: Sampling, uniform_B: Tensor) -> Tensor:
    """The token at which the cumulative distribution passes a uniform number from [0, 1), likeliest tokens first."""
    scaled_BV = logits_BV.double() / sampling.temperature  # else the sum over a large vocabulary loses its tail
    probabilities_BV, tokens_BV = scaled_BV.softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
    if sampling.top_k is not None:
        probabilities_BV = probabilities_BV[:, : sampling.top_k]
    mass_BV = probabilities_BV.cumsum(dim=-1)
    # A token is considered while those before it have not reached the share of what top_k has left.
    considered_BV = mass_BV - probabilities_BV < sampling.top_p * mass_BV[:, -1:]
    total_B1 = mass_BV.where(considered_BV, 0).amax(dim=-1, keepdim=True)
    rank_B1 = (mass_BV < uniform_B[:, None] * total_B1).sum(dim=-1, keepdim=True)
    return tokens_BV.gather(1, rank_B1)[:, 0]
