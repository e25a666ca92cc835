"""Recall tasks in words: passkey, kv and copy by depth and length, and a set in the style of RULER.

The RULER-style tasks have the kinds of RULER (Hsieh et al. 2024), with wording and filler of our own: needles in
filler (single, multikey, multivalue, multiquery), variable tracking, common words and frequent words. RULER lets a
model generate and looks for the answers anywhere in what it says. Here the questions ask for an order (of the text,
of the alphabet, of frequency), and the gold answers stand there, teacher-forced, with what separates them given: a
question is answered when every token of every answer is the likeliest one. That is stricter than RULER's score, needs
no generation, and the numbers of both are not to be compared.

Every task is a function of its random generator, the length in tokens and the depth of the answer, 0 to 1; the
RULER-style ones draw places of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from megazebra.evaluate.recall.answers import Question, Task
from megazebra.evaluate.recall.filler import Filler, made_up_words
from megazebra.evaluate.recall.texts import Answer, Encoder

NEEDLES = 4
CHAIN = 5
COMMON_WORDS, COMMON_TIMES = 5, 8
FREQUENT_WORDS, ZETA = 3, 2.0
LEAST_WORDS = 22  # of a text of frequent words: in shorter ones the third stands once, as all others do
LINE_WORDS = 8

# `build(n)` of a question, given its randomness: a fresh generator for every n, so that only n changes.
Parts = list[str]
Recipe = Callable[[np.random.Generator, int, float, Filler], Parts]


def depth_tasks(encoder: Encoder, filler: Filler) -> dict[str, Task]:
    """Tasks of which the heat map over depth and length is of interest, by name."""
    return _tasks(encoder, filler, {"passkey": passkey, "kv": key_value, "copy": copy})


def ruler_tasks(encoder: Encoder, filler: Filler) -> dict[str, Task]:
    """The RULER-style set, by name."""
    recipes: dict[str, Recipe] = {
        "needle_single": lambda *given: needles(*given, keys=1, distractors=0),
        "needle_multikey": lambda *given: needles(*given, keys=1, distractors=NEEDLES - 1),
        "needle_multivalue": lambda *given: needles(*given, keys=1, values=NEEDLES, distractors=NEEDLES - 1),
        "needle_multiquery": lambda *given: needles(*given, keys=NEEDLES, distractors=NEEDLES - 1),
        "variable_tracking": variable_tracking,
        "common_words": common_words,
        "frequent_words": frequent_words,
    }
    return _tasks(encoder, filler, recipes)


def passkey(random: np.random.Generator, n: int, depth: float, filler: Filler) -> Parts:
    """A number hidden in n sentences of filler (after Mohtashami and Jaggi 2023)."""
    key = _numbers(random, 1)[0]
    text = _hidden([f"Here is the pass key: {key}."], [depth], filler.sentences(random, n))
    return [
        "Somewhere in this text there is a pass key. Keep it in mind.\n\n",
        f"{text}\n\nQuestion: which pass key does the text give?\nAnswer: the pass key is",
        Answer(f" {key}"),
    ]


def key_value(random: np.random.Generator, n: int, depth: float, filler: Filler) -> Parts:
    """A list of n + 1 pairs of numbers; the pair at `depth` of it is asked for."""
    numbers = _numbers(random, 2 * (n + 1))
    pairs = [f"{key}: {value}" for key, value in zip(numbers[::2], numbers[1::2], strict=True)]
    chosen = round(depth * n)
    return [
        "Each line pairs two numbers.\n\n" + "\n".join(pairs),
        f"\n\nQuestion: which number stands beside {numbers[2 * chosen]}?\nAnswer: {numbers[2 * chosen]}:",
        Answer(f" {numbers[2 * chosen + 1]}"),
    ]


def copy(random: np.random.Generator, n: int, depth: float, filler: Filler) -> Parts:
    """n + 1 numbered lines of random words; the line at `depth` is to be repeated."""
    words = made_up_words(random, 64)
    picks = random.integers(len(words), size=(n + 1, LINE_WORDS)).tolist()
    lines = [" ".join(words[pick] for pick in row) for row in picks]
    numbered = "\n".join(f"Line {number}: {line}" for number, line in enumerate(lines, start=1))
    chosen = round(depth * n)
    return [f"{numbered}\n\nThe same line once more.\nLine {chosen + 1}:", Answer(f" {lines[chosen]}")]


def needles(
    random: np.random.Generator, n: int, depth: float, filler: Filler, *, keys: int, distractors: int, values: int = 1
) -> Parts:
    """Numbers that belong to names, hidden in n sentences; the numbers of `keys` names are asked for.

    values: numbers of each of these names. distractors: needles of other names. All places are drawn.
    """
    names = _names(random, keys + distractors)
    owners = [name for name in names[:keys] for _ in range(values)] + names[keys:]
    numbers = _numbers(random, len(owners))
    depths = random.random(len(owners)).tolist()
    # Several numbers of one name are asked for in the order of the text.
    for first in range(0, keys * values, values):
        depths[first : first + values] = sorted(depths[first : first + values])
    hidden = [f"The number of the {owner} is {number}." for owner, number in zip(owners, numbers, strict=True)]
    text = _hidden(hidden, depths, filler.sentences(random, n))
    asked = [f"the {name}" for name in names[:keys]]
    order = ", all of them, in the order of the text" if values > 1 else ", in this order" if keys > 1 else ""
    return [
        "Names and their numbers are hidden in this text. Keep them in mind.\n\n",
        f"{text}\n\nQuestion: which {_subject(keys * values)} to {_listed(asked)}{order}?\nAnswer:",
        *_answers(numbers[: keys * values]),
    ]


def variable_tracking(random: np.random.Generator, n: int, depth: float, filler: Filler) -> Parts:
    """Two chains of variables, each set to the one before it; all variables of one value are asked for."""
    names = _variables(random, 2 * CHAIN)
    values = _numbers(random, 2)
    hidden, depths = [], []
    for chain, value in zip((names[:CHAIN], names[CHAIN:]), values, strict=True):
        hidden += [f"Set {name} to {before}." for before, name in zip([value, *chain], chain, strict=False)]
        depths += sorted(random.random(CHAIN).tolist())
    text = _hidden(hidden, depths, filler.sentences(random, n))
    return [
        "Variables are set in this text, some to the value of another one. Keep track of them.\n\n",
        f"{text}\n\nQuestion: which {CHAIN} variables have the value {values[0]}, in the order of the text?\nAnswer:",
        *_answers(names[:CHAIN]),
    ]


def common_words(random: np.random.Generator, n: int, depth: float, filler: Filler) -> Parts:
    """A list in which a few words stand eight times and n others once; the few are asked for."""
    words = made_up_words(random, COMMON_WORDS + n)
    common = words[:COMMON_WORDS]
    listed = common * COMMON_TIMES + words[COMMON_WORDS:]
    numbered = " ".join(f"{place}. {listed[pick]}" for place, pick in enumerate(random.permutation(len(listed)), 1))
    return [
        "Some words of this list are more common than the others. Keep them in mind.\n\n",
        f"{numbered}\n\nQuestion: which {COMMON_WORDS} words are the most common ones, in alphabetical order?\nAnswer:",
        *_answers(sorted(common)),
    ]


def frequent_words(random: np.random.Generator, n: int, depth: float, filler: Filler) -> Parts:
    """A text of made-up words whose frequencies fall with the square of their rank; the first three are asked for."""
    counts = zeta_counts(LEAST_WORDS + n)
    words = made_up_words(random, len(counts))
    text = [word for word, count in zip(words, counts, strict=True) for _ in range(count)]
    return [
        "Some words of this text are more frequent than the others. Keep them in mind.\n\n",
        " ".join(text[pick] for pick in random.permutation(len(text))),
        f"\n\nQuestion: which {FREQUENT_WORDS} words are the most frequent ones, beginning with the first?\nAnswer:",
        *_answers(words[:FREQUENT_WORDS]),
    ]


def zeta_counts(words: int) -> list[int]:
    """How often each word stands in a text of so many, at least 22: in proportion to rank^-2, to the nearest number;
    what rounding leaves over goes to words that stand once."""
    ranks = np.arange(1, words + 1)
    shares = ranks**-ZETA / (ranks**-ZETA).sum()
    counts = np.rint(shares * words).astype(int)
    repeated = counts[counts > 1].tolist()
    return repeated + [1] * (words - sum(repeated))


def _tasks(encoder: Encoder, filler: Filler, recipes: dict[str, Recipe]) -> dict[str, Task]:
    def task(name: str, recipe: Recipe) -> Task:
        def ask(random: np.random.Generator, length: int, depth: float) -> Question:
            seed = int(random.integers(2**63))
            return encoder.longest(name, length, lambda n: recipe(np.random.default_rng(seed), n, depth, filler))

        return ask

    return {name: task(name, recipe) for name, recipe in recipes.items()}


def _hidden(needles: Sequence[str], depths: Sequence[float], sentences: Sequence[str]) -> str:
    """The needles among the sentences, each at its depth; those at one place keep their order."""
    placed = [(depth * len(sentences), needle) for depth, needle in zip(depths, needles, strict=True)]
    text: list[str] = []
    waiting = sorted(placed, key=lambda entry: entry[0])
    for place in range(len(sentences) + 1):
        while waiting and round(waiting[0][0]) <= place:
            text.append(waiting.pop(0)[1])
        text += sentences[place : place + 1]
    return " ".join(text)


def _answers(answers: Sequence[str]) -> list[str]:
    """' one, two, three': what separates them is not asked for."""
    parts: list[str] = []
    for place, answer in enumerate(answers):
        parts += [",", Answer(f" {answer}")] if place else [Answer(f" {answer}")]
    return parts


def _numbers(random: np.random.Generator, count: int) -> list[str]:
    """Different numbers of seven digits."""
    return [str(1_000_000 + number) for number in random.choice(9_000_000, count, replace=False).tolist()]


def _names(random: np.random.Generator, count: int) -> list[str]:
    words = made_up_words(random, 2 * count)
    return [f"{first}-{second}" for first, second in zip(words[::2], words[1::2], strict=True)]


def _variables(random: np.random.Generator, count: int) -> list[str]:
    """Different names of five capital letters."""
    numbers = random.choice(26**5, count, replace=False)
    return ["".join(chr(ord("A") + number // 26**place % 26) for place in range(5)) for number in numbers.tolist()]


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _subject(numbers: int) -> str:
    return "number belongs" if numbers == 1 else f"{numbers} numbers belong"
