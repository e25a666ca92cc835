"""Tokens are drawn from the distribution that temperature, top-k and top-p leave, and by the seed alone."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from megazebra.generate.sampler import Sampler, draw
from megazebra.generate.sampling import GREEDY, Sampling

VOCABULARY = 37
GRID = 20_000  # uniform numbers, evenly spread: frequencies are probabilities to 1 / GRID


def some_logits(rows: int = 1) -> Tensor:
    return torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(1)) * 2


def distribution(logits_V: Tensor, temperature: float, top_p: float, top_k: int | None) -> Tensor:
    """As the papers say it, token by token."""
    probabilities = (logits_V.double() / temperature).softmax(0).tolist()
    ranked = sorted(range(VOCABULARY), key=lambda token: -probabilities[token])[:top_k]
    total, kept = sum(probabilities[token] for token in ranked), []
    for token in ranked:
        kept.append(token)
        if sum(probabilities[each] for each in kept) >= top_p * total:
            break
    nucleus = sum(probabilities[token] for token in kept)
    return torch.tensor([probabilities[token] / nucleus if token in kept else 0.0 for token in range(VOCABULARY)])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize(("top_p", "top_k"), [(1.0, None), (0.9, None), (0.3, None), (1e-9, None), (1.0, 5), (0.7, 5)])
def test_frequencies_are_probabilities(temperature: float, top_p: float, top_k: int | None) -> None:
    (logits_V,) = some_logits()
    uniform = (torch.arange(GRID, dtype=torch.float64) + 0.5) / GRID
    tokens = draw(logits_V.expand(GRID, -1), Sampling(temperature, top_p, top_k), uniform)
    expected = distribution(logits_V, temperature, top_p, top_k)
    frequencies = tokens.bincount(minlength=VOCABULARY) / GRID
    # An interval of length p holds p GRID numbers of the grid, or one more or less.
    torch.testing.assert_close(frequencies.double(), expected.double(), rtol=0, atol=1.01 / GRID)
    assert not frequencies[expected == 0].any()


def test_the_edges_of_the_uniform_numbers_give_tokens_that_are_considered() -> None:
    logits = some_logits().expand(2, -1)
    uniform = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    for top_p in (0.2, 0.5, 0.9, 1.0):
        likeliest, last = draw(logits, Sampling(1.0, top_p), uniform).tolist()
        expected = distribution(logits[0], 1.0, top_p, None)
        assert likeliest == logits[0].argmax()
        assert expected[last] == expected[expected > 0].min()


def test_greedy_takes_the_likeliest() -> None:
    logits = some_logits(5)
    assert torch.equal(Sampler(GREEDY, range(5)).choose(logits), logits.argmax(dim=-1))


def test_streams_depend_on_seed_and_row_alone() -> None:
    def tokens(seed: int, rows: range, steps: int = 40) -> list[list[int]]:
        sampler = Sampler(Sampling(1.0, seed=seed), rows)
        logits = some_logits().expand(len(rows), -1)
        return torch.stack([sampler.choose(logits) for _ in range(steps)], dim=1).tolist()

    together = tokens(7, range(4))
    assert together == tokens(7, range(4))
    assert together[2:3] == tokens(7, range(2, 3))
    # Forty tokens of some dozen likely ones are never the same by chance.
    assert len({tuple(row) for row in together + tokens(8, range(4))}) == 8


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -1.0}, "temperature=-1.0 divides the logits"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": float("inf")}, "temperature=inf"),
        ({"top_p": 0.0}, "top_p=0.0 is a share"),
        ({"top_p": 1.1}, "top_p=1.1 is a share"),
        ({"top_k": 0}, "top_k=0 is a number of tokens"),
        ({"seed": -3}, "seed=-3 is negative"),
    ],
)
def test_values_without_meaning_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Sampling(**values)
