"""One conversation: a text with facts in it, then questions and their answers."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megazebra.data.errors import CorpusError
from megazebra.data.prepare.long_qa.facts import Fact, FactSource
from megazebra.data.prepare.long_qa.filler import Filler
from megazebra.data.prepare.long_qa.names import Side
from megazebra.data.prepare.long_qa.planting import plant, trimmed
from megazebra.data.prepare.long_qa.questions import KINDS, Question
from megazebra.data.prepare.long_qa.ruler import Ruler

INSTRUCTION = "Read the text, then answer from it alone.\n\n"
BEFORE_QUESTION = "\n\n"


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What conversations are to be like; of several values each conversation or question draws one.

    lengths: of all contents, the chat template's own tokens not counted. kinds: of questions. questions: in one
    conversation. facts: planted in one text, or as many as the questions need. depths: of a question's first fact,
    0 at the beginning of the text and 1 at its end; none: anywhere. distances: instead of them, from the end of the
    first fact to the end of the question, as near as there is text. Lengths and distances are in the ruler's units.
    """

    lengths: tuple[int, ...]
    kinds: tuple[str, ...] = tuple(KINDS)
    questions: int = 1
    facts: int = 8
    depths: tuple[float, ...] = ()
    distances: tuple[int, ...] = ()

    def check(self) -> None:
        """Raises CorpusError for values that are no use."""
        unknown = [kind for kind in self.kinds if kind not in KINDS]
        if unknown or not self.kinds:
            raise CorpusError(f"--kinds {' '.join(unknown)}: there are {', '.join(KINDS)}")
        if not self.lengths or min(self.lengths) < 1:
            raise CorpusError(f"--lengths {' '.join(map(str, self.lengths))}: give at least one, each at least 1")
        if self.questions < 1 or self.facts < 1:
            raise CorpusError(f"--questions {self.questions}, --facts {self.facts}: give at least 1 of each")
        if self.depths and self.distances:
            raise CorpusError("give --depths or --distances, not both: one follows from the other")
        if any(not 0 <= depth <= 1 for depth in self.depths):
            raise CorpusError(f"--depths {' '.join(map(str, self.depths))}: give numbers from 0 to 1")
        if self.distances and not 1 <= min(self.distances) <= max(self.distances) < min(self.lengths):
            raise CorpusError(
                f"--distances {' '.join(map(str, self.distances))}: each at least 1, and the farthest less than the "
                f"shortest length, {min(self.lengths)}"
            )


def make_conversation(
    wanted: Wanted, random: random.Random, side: Side, filler: Filler, ruler: Ruler
) -> dict[str, Any]:
    """A record with `messages`, as tools/preprocess_data.py takes them, and `long_qa`, what there is to know of it:

    length, unit: of all contents. target: the length that was wanted; `length` is at most that, and less by about a
    word. questions: kind, question, answer, depth and distance of the farthest fact it needs (null without one), and
    evidence: the facts it needs, each with its sentence, start (in characters of the first message), depth, distance.

    Raises CorpusError where the length has no room for the facts.
    """
    target = random.choice(wanted.lengths)
    text = filler.take(target)
    while ruler.length(text) < target:
        text += filler.take(len(text))
    source = FactSource(side, random, text)
    questions = [KINDS[random.choice(wanted.kinds)](source) for _ in range(wanted.questions)]
    facts = [fact for question in questions for fact in (*question.evidence, *question.beside)]
    facts += [source.distractor() for _ in range(wanted.facts - len(facts))]
    turns = [turn for question in questions for turn in (question.text, question.answer)]
    turns[0] = BEFORE_QUESTION + turns[0]
    sizes = [ruler.length(fact.sentence) + 1 for fact in facts]
    turn_sizes = [ruler.length(turn) for turn in turns]
    room = target - ruler.length(INSTRUCTION) - sum(turn_sizes)
    if room < sum(sizes):
        raise CorpusError(
            f"{target} {ruler.unit} have no room for {len(facts)} facts and {len(questions)} questions, which take "
            f"{target - room + sum(sizes)}; raise --lengths, or lower --facts or --questions"
        )
    # From the end of the text to that of each question.
    tails = [sum(turn_sizes[: 2 * number + 1]) for number in range(len(questions))]
    starts = _starts(wanted, random, questions, facts, sizes, tails, room)
    filler_size = room - sum(sizes)
    while True:
        (end,) = ruler.places(text, [filler_size])
        body = trimmed(text[:end])
        planted = plant(body, [fact.sentence for fact in facts], ruler.places(body, _filler_units(starts, sizes)))
        contents = [INSTRUCTION + planted.text.rstrip("\n") + turns[0], *turns[1:]]
        length = sum(map(ruler.length, contents))
        if length <= target or not filler_size:
            break
        filler_size = max(0, filler_size - (length - target))  # tokens that merge or split where texts meet
    found = _found(contents[0], facts, [len(INSTRUCTION) + start for start in planted.starts], turns[0], ruler)
    roles = ("user", "assistant") * len(questions)
    return {
        "messages": [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)],
        "long_qa": {
            "length": length,
            "unit": ruler.unit,
            "target": target,
            "questions": [
                _described(question, found, tail - tails[0]) for question, tail in zip(questions, tails, strict=True)
            ],
        },
    }


def _starts(
    wanted: Wanted,
    random: random.Random,
    questions: Sequence[Question],
    facts: Sequence[Fact],
    sizes: Sequence[int],
    tails: Sequence[int],
    room: int,
) -> list[float]:
    """Where in the text each fact is to begin, in units: a question's first where it is wanted, its others behind it,
    and those that no question needs anywhere."""
    size_of = dict(zip(facts, sizes, strict=True))
    start_of = {fact: random.uniform(0, room - size) for fact, size in size_of.items()}
    for question, tail in zip(questions, tails, strict=True):
        if not question.evidence:
            continue
        longest = max(size_of[fact] for fact in question.evidence)
        last = room - longest
        first = random.uniform(0, last)
        if wanted.depths:
            first = random.choice(wanted.depths) * last
        if wanted.distances:
            first = room - (random.choice(wanted.distances) - tail) - longest
        first = min(max(first, 0), last)
        places = [first, *sorted(random.uniform(first, last) for _ in question.evidence[1:])]
        if not question.ordered:
            random.shuffle(places)
        start_of.update(zip(question.evidence, places, strict=True))
    return [start_of[fact] for fact in facts]


def _filler_units(starts: Sequence[float], sizes: Sequence[int]) -> list[int]:
    """From places in the text to places in what it is without the facts."""
    units, before, last = [0] * len(starts), 0, 0
    for number in sorted(range(len(starts)), key=lambda number: starts[number]):
        last = units[number] = max(last, round(starts[number]) - before)  # facts that would overlap stay in order
        before += sizes[number]
    return units


def _found(
    content: str, facts: Sequence[Fact], starts: Sequence[int], first_question: str, ruler: Ruler
) -> dict[Fact, dict[str, Any]]:
    """Where the facts really are. Distances are to the end of the first question."""
    ends = [start + len(fact.sentence) for fact, start in zip(facts, starts, strict=True)]
    text_end = len(content) - len(first_question)
    begin, stop, total, *units = ruler.units(content, [len(INSTRUCTION), text_end, len(content), *starts, *ends])
    start_units, end_units = units[: len(facts)], units[len(facts) :]
    return {
        fact: {
            "sentence": fact.sentence,
            "start": start,
            "depth": round((start_unit - begin) / max(1, stop - begin - (end_unit - start_unit)), 4),
            "distance": total - end_unit,
        }
        for fact, start, start_unit, end_unit in zip(facts, starts, start_units, end_units, strict=True)
    }


def _described(question: Question, found: dict[Fact, dict[str, Any]], further: int) -> dict[str, Any]:
    """further: from the end of the first question to that of this one."""
    evidence = [found[fact] | {"distance": found[fact]["distance"] + further} for fact in question.evidence]
    farthest = max(evidence, key=lambda fact: fact["distance"], default={"depth": None, "distance": None})
    return {
        "kind": question.kind,
        "question": question.text,
        "answer": question.answer,
        "depth": farthest["depth"],
        "distance": farthest["distance"],
        "evidence": evidence,
    }
