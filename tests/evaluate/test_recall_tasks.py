"""Recall tasks: what stands where in the text, that the gold answer follows from it, and what models score."""

from __future__ import annotations

import math
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from models.zebras import CPU
from stand_ins import Copier, Guesser
from tokenizers import Tokenizer
from torch import nn

from megazebra.config import ParallelConfig
from megazebra.data.prepare.encoders.tokenizer import byte_tokenizer, train_byte_level_bpe
from megazebra.errors import UserError
from megazebra.evaluate.plan import DEPTH_TASKS, Plan
from megazebra.evaluate.recall.answers import AnswerCell, Question
from megazebra.evaluate.recall.filler import Filler
from megazebra.evaluate.recall.text_tasks import (
    LEAST_WORDS,
    NEEDLES,
    depth_tasks,
    frequent_words,
    ruler_tasks,
    zeta_counts,
)
from megazebra.evaluate.recall.texts import Answer, Encoder
from megazebra.evaluate.recall.token_tasks import ASK, BEGIN, Alphabet, token_tasks
from megazebra.evaluate.results import Row
from megazebra.evaluate.scoring import evaluate_model
from megazebra.parallel.mesh import ParallelMesh

BYTES = byte_tokenizer()
DEPTHS = (0.0, 0.3, 1.0)
RULER = list(ruler_tasks(Encoder(BYTES), Filler()))


def token_cell(task: str, length: int, depth: float | None, vocab_size: int = 32, **changes: int) -> AnswerCell:
    settings = {"samples": 3, "seed": 1} | changes
    return AnswerCell(task, token_tasks(vocab_size)[task], length=length, depth=depth, **settings)


def text_cell(task: str, length: int, depth: float | None = None, tokenizer: Tokenizer = BYTES) -> AnswerCell:
    encoder, filler = Encoder(tokenizer), Filler()
    tasks = depth_tasks(encoder, filler) | ruler_tasks(encoder, filler)
    return AnswerCell(task, tasks[task], 3, length, depth, seed=1)


def read(question: Question, tokenizer: Tokenizer = BYTES) -> tuple[str, list[str], str]:
    """The text before the answer, the answers, and the whole text."""
    first = int(question.is_answer.argmax())
    edges = np.flatnonzero(np.diff([False, *question.is_answer, False]))
    ids = question.tokens.tolist()
    answers = [tokenizer.decode(ids[start:end]).strip() for start, end in edges.reshape(-1, 2).tolist()]
    return tokenizer.decode(ids[:first]), answers, tokenizer.decode(ids)


def scores(model: nn.Module, plan: Plan) -> list[Row]:
    return evaluate_model(model, ParallelMesh.build(ParallelConfig()), CPU, plan.cells())


@pytest.mark.parametrize("task", DEPTH_TASKS)
@pytest.mark.parametrize("depth", DEPTHS)
def test_token_tasks_keep_their_length_and_alphabet(task: str, depth: float) -> None:
    for length in (80, 301):
        question = token_cell(task, length, depth).question(0)
        assert len(question.tokens) == len(question.is_answer) == length
        assert set(question.tokens[question.is_answer].tolist()) <= set(Alphabet(32).symbols)
        first = int(question.is_answer.argmax())
        assert question.is_answer[first:].all(), "the answer is the end"
        assert question.tokens.min() >= 0
        assert question.tokens.max() < 32


@pytest.mark.parametrize("depth", DEPTHS)
def test_where_the_passkey_is(depth: float) -> None:
    question = token_cell("passkey", 80, depth).question(0)
    text, key = question.tokens[:-5], question.tokens[-4:]
    assert question.tokens[-5] == ASK
    (place,) = np.flatnonzero(text == BEGIN)
    assert place == round(depth * (80 - 5 - 5))
    assert np.array_equal(text[place + 1 : place + 5], key)
    assert set(np.delete(text, np.s_[place : place + 5]).tolist()) <= set(Alphabet(32).filler)


def test_without_a_depth_every_sample_draws_one() -> None:
    cell = token_cell("passkey", 80, None, samples=40)
    places = [int((cell.question(index).tokens == BEGIN).argmax()) for index in range(cell.samples)]
    assert len(set(places)) > 20
    assert min(places) < 15
    assert max(places) > 55


@pytest.mark.parametrize("depth", DEPTHS)
def test_where_the_pair_is(depth: float) -> None:
    question = token_cell("kv", 300, depth).question(0)
    value = question.tokens[-2:]
    (ask,) = np.flatnonzero(question.tokens == ASK)
    key = question.tokens[ask + 1 : -2]
    begins = np.flatnonzero(question.tokens == BEGIN)
    keys = [tuple(question.tokens[begin + 1 : begin + 1 + len(key)].tolist()) for begin in begins]
    assert len(set(keys)) == len(keys) > 40, "keys are different"
    found = keys.index(tuple(key.tolist()))
    assert found == round(depth * (len(keys) - 1))
    assert np.array_equal(question.tokens[begins[found] + 1 + len(key) :][:2], value)


@pytest.mark.parametrize("depth", DEPTHS)
def test_where_the_passage_to_copy_is(depth: float) -> None:
    question = token_cell("copy", 300, depth).question(0)
    (ask,) = np.flatnonzero(question.tokens == ASK)
    passage = question.tokens[ask + 1 :]
    text = question.tokens[:ask]
    place = round(depth * (len(text) - len(passage)))
    assert np.array_equal(text[place : place + len(passage)], passage)
    assert question.is_answer.sum() == 32
    cue = passage[:-32].tolist()
    starts = [i for i in range(len(text)) if text[i : i + len(cue)].tolist() == cue]
    assert starts == [place], "what is asked for is unambiguous"


@pytest.mark.parametrize("task", DEPTH_TASKS)
@pytest.mark.parametrize("words", [False, True])
def test_a_question_is_a_function_of_its_place(task: str, words: bool) -> None:
    def make(length: int = 600, depth: float = 0.5, index: int = 0) -> bytes:
        cell = text_cell(task, length, depth) if words else token_cell(task, length, depth)
        return cell.question(index).tokens.tobytes()

    first = make()
    assert make() == first
    assert len({first, make(index=1), make(depth=0.25), make(length=700)}) == 4


def test_tasks_in_words_fill_the_length_and_not_more() -> None:
    # A unit of text (a sentence, a pair, a line, a word) has at most 120 bytes.
    for task in (*DEPTH_TASKS, *RULER):
        for length in (900, 2000):
            question = text_cell(task, length, 0.5 if task in DEPTH_TASKS else None).question(1)
            assert length - 120 < len(question.tokens) <= length, task


@pytest.mark.parametrize("depth", DEPTHS)
def test_answers_in_words_stand_at_their_depth(depth: float) -> None:
    before, (key,), _ = read(text_cell("passkey", 4000, depth).question(0))
    body = before.split("\n\n")[1]
    # A sentence more or less: 70 of 4,000 characters.
    assert abs(body.index(f"Here is the pass key: {key}.") / len(body) - depth) < 0.02
    before, (value,), _ = read(text_cell("kv", 4000, depth).question(0))
    pairs = dict(line.split(": ") for line in before.split("\n\n")[1].split("\n"))
    asked = before.split("\nAnswer: ")[1].rstrip(":")
    assert pairs[asked] == value
    assert list(pairs).index(asked) == round(depth * (len(pairs) - 1))
    before, (line,), _ = read(text_cell("copy", 4000, depth).question(0))
    lines = before.split("\n\n")[0].split("\n")
    number = int(before.rsplit("Line ", 1)[1].rstrip(":"))
    assert lines[number - 1] == f"Line {number}: {line}"
    assert number - 1 == round(depth * (len(lines) - 1))


def answered(task: str, before: str) -> list[str]:
    """The answer worked out from the text, by other means than it was made."""
    text, question = before.split("\n\nQuestion: ")
    if task.startswith("needle"):
        numbers = re.findall(r"The number of the (\S+) is (\d+)\.", text)
        asked = re.findall(r"the (\w+-\w+)", question)
        return [number for name in asked for owner, number in numbers if owner == name]
    if task == "variable_tracking":
        values: dict[str, str] = {}
        for name, value in re.findall(r"Set (\w+) to (\w+)\.", text):
            values[name] = values.get(value, value)  # fails unless the variable was set before
        (wanted,) = re.findall(r"the value (\d+)", question)
        return [name for name, value in values.items() if value == wanted]
    words = re.findall(r"[a-z]+", text.split("\n\n")[1])
    ranked = Counter(words).most_common()
    count = int(re.findall(r"which (\d) words", question)[0])
    if task == "common_words":
        assert ranked[count - 1][1] > ranked[count][1]
        return sorted(word for word, _ in ranked[:count])
    assert len({times for _, times in ranked[: count + 1]}) == count + 1, "the order is unambiguous"
    return [word for word, _ in ranked[:count]]


@pytest.mark.parametrize("task", RULER)
def test_gold_answers_follow_from_the_text(task: str) -> None:
    for index in range(3):
        before, answers, whole = read(text_cell(task, 1500).question(index))
        assert answers == answered(task, before)
        assert whole.endswith(", ".join(answers)), "separators are not asked for"
    numbers = {"needle_single": 1, "needle_multikey": 1, "needle_multivalue": NEEDLES, "needle_multiquery": NEEDLES}
    assert len(answers) == numbers.get(task, len(answers))
    if task == "needle_multikey":
        assert len(re.findall(r"The number of the", before)) == NEEDLES


def test_any_tokenizer_marks_whole_answers() -> None:
    filler = Filler()
    sentences = filler.sentences(np.random.default_rng(0), 500)
    merging = train_byte_level_bpe([*sentences, "Here is the pass key: 1234567. Answer: the pass key is"] * 3, 700)
    assert len(merging.encode("The quiet river").ids) < len("The quiet river") / 2
    cell = text_cell("passkey", 500, 0.5, merging)
    _, (key,), whole = read(cell.question(0), merging)
    assert re.search(rf"pass key: {key}\..*the pass key is {key}$", whole, re.DOTALL)
    question = Encoder(merging).question(["The quiet ri", Answer("ver le"), "ans against"])
    marked = [merging.decode([token]) for token in question.tokens[question.is_answer].tolist()]
    assert "".join(marked).strip().startswith("river"), "a token with one character of the answer is asked for"


def test_filler_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("It was night.  Who\ncame? Nobody!\n\nA heading\n\nThe end.")
    filler = Filler.from_file(tmp_path / "book.txt")
    drawn = filler.sentences(np.random.default_rng(3), 12)
    assert set(drawn) == {"It was night.", "Who came?", "Nobody!", "A heading", "The end."}
    assert drawn[:7] == drawn[5:12]
    (tmp_path / "book.txt").write_text(" \n\n ")
    with pytest.raises(UserError, match=r"book\.txt has no text"):
        Filler.from_file(tmp_path / "book.txt")


def test_a_model_that_copies_scores_everything() -> None:
    tokens = Plan(tasks=DEPTH_TASKS, lengths=[90, 130], depths=DEPTHS, samples=4, vocab_size=32)
    rows = scores(Copier({ASK: BEGIN}), tokens)
    assert len(rows) == 3 * 2 * 3
    assert all(row.exact_match == row.token_accuracy == 1 and row.loss == 0 for row in rows)
    words = Plan(tasks=["kv", "copy"], lengths=[400], depths=[0, 1], samples=2, vocab_size=257, encoder=Encoder(BYTES))
    assert all(row.exact_match == 1 for row in scores(Copier({}), words))


def test_a_model_that_guesses_is_at_chance() -> None:
    plan = Plan(tasks=DEPTH_TASKS, lengths=[90], depths=[0.5], samples=60, vocab_size=32)
    symbols = Alphabet(32).symbols
    chance = 1 / len(symbols)
    for row in scores(Guesser(symbols), plan):
        deviation = math.sqrt(chance * (1 - chance) / row.tokens)
        assert abs((row.token_accuracy or 0) - chance) < 4 * deviation
        assert row.exact_match == 0 or row.task == "kv"  # two of fifteen symbols: once in 225


def test_zeta_counts_fall_and_add_up() -> None:
    for words in (*range(LEAST_WORDS, 1000), 12345):
        counts = zeta_counts(words)
        assert sum(counts) == words
        assert counts == sorted(counts, reverse=True)
        assert counts[0] > counts[1] > counts[2] > counts[3], "the question has one right answer"


def test_the_shortest_text_of_frequent_words_has_one_right_answer() -> None:
    parts = frequent_words(np.random.default_rng(0), 0, 0.0, Filler())
    counts = Counter(parts[1].split())
    answers = [str(part).strip() for part in parts if isinstance(part, Answer)]
    assert answers == [word for word, _ in counts.most_common(3)]
    third, fourth = (count for _, count in counts.most_common(4)[2:])
    assert third > fourth


def test_what_cannot_be_is_told() -> None:
    with pytest.raises(UserError, match=r"there is no task 'niah'; the tasks are positions, contexts, passkey, kv"):
        Plan(tasks=["niah"], lengths=[64], vocab_size=32)
    with pytest.raises(UserError, match="depth 150% is outside"):
        Plan(tasks=["kv"], lengths=[64], depths=[1.5], vocab_size=32)
    with pytest.raises(UserError, match="the task ruler is made of words and needs a tokenizer"):
        Plan(tasks=["ruler"], lengths=[64], vocab_size=32).cells()
    with pytest.raises(UserError, match="the task contexts needs a held-out corpus"):
        Plan(tasks=["contexts"], lengths=[64], vocab_size=32).cells()
    with pytest.raises(UserError, match="a question of passkey has at least 10 tokens; length 9 is too short"):
        token_cell("passkey", 9, 0.0).question(0)
    with pytest.raises(UserError, match=r"a question of passkey has at least \d+ tokens; length 20 is too short"):
        text_cell("passkey", 20, 0.0).question(0)
    with pytest.raises(UserError, match="token-level tasks need a vocabulary of 8 ids, not 7"):
        token_tasks(7)
