"""Synthetic long question answering: what the documents say, where they say it, and what follows from it."""

from __future__ import annotations

import json
import re
from itertools import islice
from typing import Any

import pytest

from megazebra.data.errors import CorpusError
from megazebra.data.prepare.encoders.tokenizer import byte_tokenizer, save_tokenizer, train_byte_level_bpe
from megazebra.data.prepare.long_qa.build import LongQA, write_json_lines
from megazebra.data.prepare.long_qa.conversation import Wanted
from megazebra.data.prepare.long_qa.planting import plant
from megazebra.data.prepare.long_qa.questions import KINDS
from megazebra.data.prepare.long_qa.ruler import CharacterRuler, TokenRuler

NAME = r"[A-Z][a-z]+ [A-Z][a-z]+"
STATEMENT = re.compile(
    rf"The (?P<a1>[a-z ]+) of (?P<p1>{NAME}) is (?P<v1>[^.]+)\."
    rf"|(?P<p2>{NAME}) has (?P<v2>[^.]+?) as (?P<a2>[a-z ]+)\."
    rf"|As to (?P<p3>{NAME}), the (?P<a3>[a-z ]+) is (?P<v3>[^.]+)\."
)


def long_qa(texts, *, held_out_share=0.3, tokenizer=None, seed=7, **wanted) -> LongQA:
    return LongQA(
        inputs=(str(texts),),
        tokenizer=tokenizer,
        held_out_share=held_out_share,
        seed=seed,
        wanted=Wanted(**{"lengths": (1500, 3000), "questions": 2, **wanted}),
    )


def made(job: LongQA, count: int = 30, *, validation: bool = False) -> list[dict[str, Any]]:
    return list(islice(job.conversations(validation=validation), count))


def statements(content: str) -> list[tuple[str, str, str]]:
    """Person, attribute and value of every statement, in the order of the text: what a reader finds there."""
    found = []
    for match in STATEMENT.finditer(content):
        groups = {name[0]: value for name, value in match.groupdict().items() if value is not None}
        found.append((groups["p"], groups["a"], groups["v"]))
    return found


def answer(question: str, said: list[tuple[str, str, str]]) -> str:
    """The answer that follows from the statements alone."""
    known = {(person, attribute): value for person, attribute, value in said}
    assert len(known) == len(said), "a text that contradicts itself"
    if match := re.fullmatch(rf"Who has the larger ([a-z ]+), ({NAME}) or ({NAME})\?", question):
        attribute, *people = match.groups()
        return max(people, key=lambda person: int(known[person, attribute]))
    if match := re.match(r"Who has ([\w ]+) as ([a-z ]+)\? Name all", question):
        value, attribute = match.groups()
        return ", ".join(person for person, other, its in said if (other, its) == (attribute, value))
    for form in (r"What is the ([a-z ]+?) of (.+)\?", r"Which ([a-z ]+?) does (.+) have\?"):
        if match := re.fullmatch(form, question):
            attribute, whom = match.groups()
            if chained := re.fullmatch(rf"the ([a-z ]+) of ({NAME})", whom):
                whom = known[chained[2], chained[1]]
            return known.get((whom, attribute), "The text does not say.")
    raise AssertionError(f"no such question: {question}")


@pytest.mark.parametrize("kind", KINDS)
def test_the_answer_follows_from_the_text_alone(texts, kind):
    for conversation in made(long_qa(texts, kinds=(kind,))):
        first, *others = conversation["messages"]
        document, question = first["content"].rsplit("\n\n", 1)
        said = statements(document)
        assert len(said) >= 8
        asked = [question, *(message["content"] for message in others if message["role"] == "user")]
        answers = [message["content"] for message in others if message["role"] == "assistant"]
        assert [answer(question, said) for question in asked] == answers
        about = conversation["long_qa"]["questions"]
        assert [(entry["kind"], entry["question"], entry["answer"]) for entry in about] == [
            (kind, *exchange) for exchange in zip(asked, answers, strict=True)
        ]


def test_every_kind_needs_its_number_of_facts(texts):
    for kind, counts in {"direct": {1}, "compare": {2}, "chain": {2}, "list": {2, 3, 4}, "unknown": {0}}.items():
        conversations = made(long_qa(texts, kinds=(kind,)), 40)
        found = {len(question["evidence"]) for each in conversations for question in each["long_qa"]["questions"]}
        assert found == counts


@pytest.mark.parametrize("tokenizer", [None, "bytes", "bpe"])
def test_facts_are_where_the_record_says(texts, tmp_path, tokenizer):
    ruler = CharacterRuler()
    if tokenizer is not None:
        model = byte_tokenizer() if tokenizer == "bytes" else train_byte_level_bpe([texts.as_posix() * 9], 300)
        save_tokenizer(model, tmp_path / "tokenizer.json")
        tokenizer, ruler = str(tmp_path), TokenRuler(model)
    for conversation in made(long_qa(texts, tokenizer=tokenizer)):
        contents = [message["content"] for message in conversation["messages"]]
        about = conversation["long_qa"]
        assert about["length"] == sum(map(ruler.length, contents))
        # A word of the texts, and the white space that is left out at their end, are worth 8 units at most.
        assert about["target"] - 8 <= about["length"] <= about["target"]
        for number, question in enumerate(about["questions"]):
            for fact in question["evidence"]:
                end = fact["start"] + len(fact["sentence"])
                assert contents[0][fact["start"] : end] == fact["sentence"]
                between = [contents[0][end:], *contents[1 : 2 * number + 1]]
                # The token across the fact's end is counted on one side or the other.
                assert abs(sum(map(ruler.length, between)) - fact["distance"]) <= 1
                assert 0 <= fact["depth"] <= 1
            assert question["distance"] == max((fact["distance"] for fact in question["evidence"]), default=None)


def test_facts_lie_at_the_depths_and_distances_asked_for(texts):
    # Off by half a line of 80 characters, and by two other facts of 60 that were to lie at the same place.
    most = 160
    job = long_qa(texts, kinds=("direct",), questions=1, depths=(0, 0.5, 1), lengths=(3000,))
    for conversation in made(job):
        (question,) = conversation["long_qa"]["questions"]
        assert min(abs(question["depth"] - depth) for depth in (0, 0.5, 1)) < most / 2900
    for conversation in made(long_qa(texts, kinds=("direct", "chain"), distances=(500, 1200), lengths=(3000,))):
        for question in conversation["long_qa"]["questions"]:
            assert min(abs(question["distance"] - distance) for distance in (500, 1200)) < most


def test_held_out_names_and_texts_stand_in_no_training_fact(texts):
    sides = []
    for validation in (False, True):
        conversations = [
            conversation
            for seed in (1, 2)
            for conversation in made(long_qa(texts, seed=seed, facts=20), validation=validation)
        ]
        contents = [conversation["messages"][0]["content"] for conversation in conversations]
        names = {name for content in contents for person, _, value in statements(content) for name in (person, value)}
        lines = {line for content in contents for line in content.split("\n") if len(line) > 40}
        sides.append((names, lines - {line for line in lines if STATEMENT.search(line)}))
    (train_names, train_lines), (held_out_names, held_out_lines) = sides
    assert len(held_out_names) > 500
    assert not train_names & held_out_names
    shared = {line for line in train_lines & held_out_lines if not line.startswith("Read the text")}
    assert not shared


def test_the_same_arguments_give_the_same_bytes(texts, tmp_path):
    for name, seed in (("one", 7), ("again", 7), ("other", 8)):
        write_json_lines(tmp_path / name, islice(long_qa(texts, seed=seed).conversations(validation=False), 12))
    one, again, other = ((tmp_path / name).read_bytes() for name in ("one", "again", "other"))
    assert one == again != other
    # More conversations go on where fewer end.
    assert made(long_qa(texts), 5) == [json.loads(line) for line in one.splitlines()[:5]]


def test_failed_writing_leaves_nothing(tmp_path):
    def broken():
        yield {"messages": []}
        raise CorpusError("no more")

    with pytest.raises(CorpusError, match="no more"):
        write_json_lines(tmp_path / "out.jsonl", broken())
    assert list(tmp_path.iterdir()) == []


def test_planting_keeps_the_text_and_the_order():
    text = "one\ntwo words\n" + "x" * 400
    planted = plant(text, ["C.", "A.", "B."], [len(text), 0, 0])
    assert planted.text == f"A.\nB.\n{text}\nC.\n"
    assert [planted.text[start : start + 2] for start in planted.starts] == ["C.", "A.", "B."]
    assert plant(text, ["A."], [200]).text == f"{text[:200]}\nA.\n{text[200:]}"


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"lengths": (300,)}, r"300 characters have no room for 8 facts and 2 questions, which take \d+; raise"),
        ({"kinds": ("riddle",)}, "--kinds riddle: there are direct, compare, chain, list, unknown"),
        ({"depths": (0.5, 1.5)}, "--depths 0.5 1.5: give numbers from 0 to 1"),
        ({"depths": (0.5,), "distances": (9,)}, "not both"),
        ({"distances": (1500,)}, "less than the shortest length, 1500"),
        ({"distances": (0, 500)}, "--distances 0 500: each at least 1, and the farthest less"),
        ({"distances": (-3,)}, "--distances -3: each at least 1"),
    ],
)
def test_what_cannot_be_made_is_refused(texts, wanted, message):
    with pytest.raises(CorpusError, match=message):
        made(long_qa(texts, **wanted), 1)


def test_names_that_run_out_are_an_error(texts):
    with pytest.raises(CorpusError, match="draws gave no unused held-out name; lower --facts"):
        made(long_qa(texts, held_out_share=1e-9), 1, validation=True)
