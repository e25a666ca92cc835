"""What is said of made-up people: one attribute, one value, one sentence."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from megazebra.data.prepare.long_qa import names
from megazebra.data.prepare.long_qa.names import Side

STATEMENTS = (
    "The {attribute} of {person} is {value}.",
    "{person} has {value} as {attribute}.",
    "As to {person}, the {attribute} is {value}.",
)


@dataclass(frozen=True)
class Attribute:
    """make: draws a value."""

    name: str
    make: Callable[[random.Random], str]


PLACES = (Attribute("home town", names.place), Attribute("birthplace", names.place))
NUMBERS = (
    Attribute("house number", names.number),
    Attribute("member number", names.number),
    Attribute("monthly rent", names.number),
)
PEOPLE = (Attribute("mentor", names.person), Attribute("neighbour", names.person))


@dataclass(frozen=True)
class Fact:
    person: str
    attribute: Attribute
    value: str
    sentence: str


class FactSource:
    """The facts of one document: no name stands for two things, so that nothing is true by accident.

    text: what the facts will be planted in; names that occur there are not used.
    """

    def __init__(self, side: Side, random: random.Random, text: str) -> None:
        self.random = random
        self._side = side
        self._text = text
        self._used: set[str] = set()

    def name(self, make: Callable[[random.Random], str]) -> str:
        """A name that nothing else in the document has."""
        name = self._side.draw(make, self.random, lambda name: name in self._used or name in self._text)
        self._used.add(name)
        return name

    def fact(self, attribute: Attribute, person: str | None = None, value: str | None = None) -> Fact:
        """A sentence about `person`, by default a new one, with `value`, by default a new one."""
        person, value = person or self.name(names.person), value or self.name(attribute.make)
        form = self.random.choice(STATEMENTS)
        return Fact(person, attribute, value, form.format(attribute=attribute.name, person=person, value=value))

    def distractor(self) -> Fact:
        """A fact that answers no question."""
        return self.fact(self.random.choice((*PLACES, *NUMBERS, *PEOPLE)))
