"""Made-up people, places and numbers, and which of them are held out."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from megazebra.data.errors import CorpusError
from megazebra.data.prepare.inputs.files import held_out

GIVEN_NAMES, SURNAME_STARTS, SURNAME_ENDS, PLACE_SIDES, PLACE_STARTS, PLACE_ENDS = (
    line.split()
    for line in (
        "Ada Anton Bela Carla Dario Edda Emil Fenja Gustav Hanna Ivo Jette Kaspar Lene Malte Nora Olaf Paula Quirin",
        "Bren Cald Dorn Elm Fal Gar Hol Ist Jor Kel Lor Mar Nev Ost Pel Rud Sten Tor Ulm Vos Wel Yar",
        "ack berg dahl eck feld gard hoff ik lund mann nitz os quist rup stad um",
        "Upper Lower Old New Great Little East West Long High Low Nether Far Middle Broad Deep",
        "Alder Birch Clay Drift Ember Frost Glen Heath Iron Juniper Kirk Lark Moss North Oak Pine Reed",
        "bourne bridge by cliff dale ford gate haven leigh mere mouth stead thorpe ton wick worth",
    )
)
NUMBERS = range(1000, 10000)
MOST_DRAWS = 20_000


def person(random: random.Random) -> str:
    return f"{random.choice(GIVEN_NAMES)} {random.choice(SURNAME_STARTS)}{random.choice(SURNAME_ENDS)}"


def place(random: random.Random) -> str:
    return f"{random.choice(PLACE_SIDES)} {random.choice(PLACE_STARTS)}{random.choice(PLACE_ENDS)}"


def number(random: random.Random) -> str:
    return str(random.choice(NUMBERS))


@dataclass(frozen=True)
class Side:
    """The names that training conversations, or held-out ones, may use.

    A hash of the name decides, not a seed: what one data set holds out, no other one trains on. share: of all names
    that are held out.
    """

    validation: bool
    share: float

    def has(self, name: str) -> bool:
        return held_out(name.encode(), self.share) == self.validation

    def draw(self, make: Callable[[random.Random], str], random: random.Random, taken: Callable[[str], bool]) -> str:
        """A name of this side for which `taken` is false. Raises CorpusError where there seems to be none left."""
        for _ in range(MOST_DRAWS):
            name = make(random)
            if self.has(name) and not taken(name):
                return name
        side = "held-out" if self.validation else "training"
        raise CorpusError(
            f"{MOST_DRAWS} draws gave no unused {side} name; lower --facts, or give another --held-out-share than "
            f"{self.share}"
        )
