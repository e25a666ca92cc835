"""Kinds of questions. Each function draws the facts that a question needs, and asks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from megazebra.data.prepare.long_qa.facts import NUMBERS, PEOPLE, PLACES, Fact, FactSource

QUESTIONS = ("What is the {attribute} of {whom}?", "Which {attribute} does {whom} have?")
UNKNOWN = "The text does not say."
FEWEST_LISTED, MOST_LISTED = 2, 4


@dataclass(frozen=True)
class Question:
    """evidence: what the answer follows from, in the order in which the text has to give it where `ordered`.
    beside: facts that are to be in the text without being evidence."""

    kind: str
    text: str
    answer: str
    evidence: tuple[Fact, ...]
    beside: tuple[Fact, ...] = ()
    ordered: bool = False


def direct(source: FactSource) -> Question:
    """One fact: a person's place or number."""
    fact = source.fact(source.random.choice((*PLACES, *NUMBERS)))
    return Question("direct", _what(source, fact.attribute.name, fact.person), fact.value, (fact,))


def compare(source: FactSource) -> Question:
    """Two facts compared: whose number is larger."""
    attribute = source.random.choice(NUMBERS)
    one, other = source.fact(attribute), source.fact(attribute)
    larger = max(one, other, key=lambda fact: int(fact.value))
    text = f"Who has the larger {attribute.name}, {one.person} or {other.person}?"
    return Question("compare", text, larger.person, (one, other))


def chain(source: FactSource) -> Question:
    """Two facts chained: the person that one leads to is the one the other is about."""
    link, asked = source.random.choice(PEOPLE), source.random.choice((*PLACES, *NUMBERS))
    first = source.fact(link)
    second = source.fact(asked, person=first.value)
    text = _what(source, asked.name, f"the {link.name} of {first.person}")
    return Question("chain", text, second.value, (first, second))


def list_all(source: FactSource) -> Question:
    """Several facts: everybody with the same value, in the order of the text."""
    attribute = source.random.choice(PLACES)
    value = source.name(attribute.make)
    count = source.random.randint(FEWEST_LISTED, MOST_LISTED)
    facts = tuple(source.fact(attribute, value=value) for _ in range(count))
    text = f"Who has {value} as {attribute.name}? Name all, in the order of the text."
    return Question("list", text, ", ".join(fact.person for fact in facts), facts, ordered=True)


def unknown(source: FactSource) -> Question:
    """No fact: the text speaks of the person, but not of this attribute."""
    said, asked = source.random.sample((*PLACES, *NUMBERS, *PEOPLE), 2)
    beside = source.fact(said)
    return Question("unknown", _what(source, asked.name, beside.person), UNKNOWN, (), (beside,))


KINDS: dict[str, Callable[[FactSource], Question]] = {
    "direct": direct,
    "compare": compare,
    "chain": chain,
    "list": list_all,
    "unknown": unknown,
}


def _what(source: FactSource, attribute: str, whom: str) -> str:
    return source.random.choice(QUESTIONS).format(attribute=attribute, whom=whom)
