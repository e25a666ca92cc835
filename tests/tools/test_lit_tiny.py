"""tools/experiments/lit_tiny.py: its tokenizer knows every word, and (slow) the experiment's claim holds."""

from __future__ import annotations

import importlib.util
import json
import random
import subprocess
import sys
import types
from pathlib import Path

import pytest

from megazebra.data.prepare.long_qa import facts
from megazebra.data.prepare.long_qa.facts import FactSource
from megazebra.data.prepare.long_qa.names import Side
from megazebra.data.prepare.long_qa.questions import direct

SCRIPT = Path(__file__).parents[2] / "tools" / "experiments" / "lit_tiny.py"


@pytest.fixture(scope="module")
def lit_tiny() -> types.ModuleType:
    specification = importlib.util.spec_from_file_location("lit_tiny", SCRIPT)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_no_word_is_unknown_and_no_name_is_one_token(lit_tiny: types.ModuleType) -> None:
    tokenizer = lit_tiny.small_tokenizer()
    source = FactSource(Side(validation=True, share=0.2), random.Random(0), "")
    for _ in range(50):
        question = direct(source)
        for text in (question.text, question.answer, question.evidence[0].sentence, lit_tiny.INSTRUCTION):
            assert "[UNK]" not in tokenizer.encode(text).tokens
        tokens = {"number": 4, "place": 3}[lit_tiny.value_kind(question.answer)]
        assert len(tokenizer.encode(question.answer).tokens) == tokens


def test_base_texts_repeat_every_fact_and_ask_nothing(lit_tiny: types.ModuleType) -> None:
    source = FactSource(Side(validation=False, share=0.2), random.Random(0), "")
    said = [source.fact(facts.PLACES[0]).sentence for _ in range(3)]
    evidence = [{"evidence": [{"sentence": sentence}]} for sentence in said]
    (text,) = lit_tiny.base_texts([{"long_qa": {"questions": evidence}}], random.Random(0))
    assert all(text.count(sentence) == lit_tiny.TIMES_SAID for sentence in said)
    assert "?" not in text


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_tuning_raises_exact_match_from_chance(tmp_path: Path) -> None:
    numbers = tmp_path / "lit.json"
    subprocess.run([sys.executable, str(SCRIPT), "--work", str(tmp_path / "lit"), "--json", str(numbers)], check=True)
    results = json.loads(numbers.read_text())
    assert results["before"]["all"] < 0.02
    assert results["after"]["all"] > 0.9
