from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from text_builds import write_texts
from tokenizers import Tokenizer

TOOL = Path(__file__).parents[3] / "tools" / "preprocess_data.py"


@pytest.fixture(scope="session")
def tool() -> types.ModuleType:
    """tools/preprocess_data.py."""
    specification = importlib.util.spec_from_file_location("preprocess_data", TOOL)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture
def run(tool, tmp_path, capsys) -> Callable[..., tuple[int, str]]:
    """Takes options of the tool besides --output, which is tmp_path / out; returns exit code and output."""

    def run_tool(*options, tokenizer=("--tokenizer", "bytes")):
        code = tool.main(["--output", str(tmp_path / "out"), *tokenizer, *map(str, options)])
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    return run_tool


@pytest.fixture
def texts(tmp_path) -> Path:
    write_texts(tmp_path / "source")
    return tmp_path / "source"


@pytest.fixture
def build_texts(run, texts) -> Callable[..., tuple[int, str]]:
    """`run` on the texts, with a new tokenizer and every fifth document held out."""

    def build(*options, tokenizer=("--train-tokenizer", "300")):
        return run("--input", texts, "--validation-share", "0.2", *options, tokenizer=tokenizer)

    return build


class FaultyGigatoken:
    """gigatoken's calls, by the tokenizers library, with another first token where a text contains `wrong`."""

    def __init__(self, content: str, wrong: str) -> None:
        self._tokenizer, self._wrong = Tokenizer.from_str(content), wrong

    def encode_batch(self, texts, parallel):
        rows = [self._tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
        rows = [[5, *row[1:]] if self._wrong in text else row for text, row in zip(texts, rows, strict=True)]
        offsets = np.cumsum([0, *map(len, rows)])
        content = np.array([token for row in rows for token in row], dtype=np.uint32)
        data = types.SimpleNamespace
        return data(layout=data(content=data(data=content), offsets=data(data=offsets)))


@pytest.fixture
def install_faulty_gigatoken(monkeypatch) -> Callable[[str], None]:
    """Takes the text that the gigatoken of this test gets wrong."""

    def install(wrong: str) -> None:
        tokenizer = types.SimpleNamespace(from_json=lambda content: FaultyGigatoken(content, wrong))
        monkeypatch.setitem(sys.modules, "gigatoken", types.SimpleNamespace(Tokenizer=tokenizer))

    return install
