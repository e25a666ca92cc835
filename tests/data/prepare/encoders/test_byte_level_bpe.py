"""The tokenizer: deterministic, lossless, and deaf to special tokens inside documents."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

from megazebra.data.errors import CorpusError
from megazebra.data.prepare.encoders.tokenizer import (
    EOD_TOKEN,
    eod_id,
    load_tokenizer,
    save_tokenizer,
    serialize,
    train_byte_level_bpe,
    vocab_size,
)

TEXTS = [f"def function_{n}(argument):\n    return argument + {n}\n" for n in range(200)]
TEXT = "größer 日本 \x00\t\r\n  def f(): 🦓"


@pytest.fixture(scope="module")
def tokenizer():
    return train_byte_level_bpe(TEXTS, 300)


def test_vocabulary_and_eod(tokenizer):
    assert vocab_size(tokenizer) == 300
    assert eod_id(tokenizer) == 0


def test_any_text_comes_back(tokenizer):
    assert tokenizer.decode(tokenizer.encode(TEXT).ids) == TEXT


def test_special_token_in_a_document_is_text(tokenizer, tmp_path):
    save_tokenizer(tokenizer, tmp_path / "tokenizer.json")
    for each in (tokenizer, load_tokenizer(tmp_path / "tokenizer.json")):
        ids = each.encode(f"a{EOD_TOKEN}b", add_special_tokens=False).ids
        assert eod_id(each) not in ids
        assert each.decode(ids) == f"a{EOD_TOKEN}b"


def tokenizer_fingerprint(tokenizer):
    """sha256 of tokenizer.json as save_tokenizer writes it."""
    return hashlib.sha256(serialize(tokenizer)).hexdigest()


def test_saved_file_has_the_fingerprint(tokenizer, tmp_path):
    path = tmp_path / "tokenizer.json"
    save_tokenizer(tokenizer, path)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == tokenizer_fingerprint(tokenizer)
    loaded = load_tokenizer(path)
    assert tokenizer_fingerprint(loaded) == tokenizer_fingerprint(tokenizer)
    assert [file.name for file in tmp_path.iterdir()] == ["tokenizer.json"]


def test_training_is_deterministic_across_processes(tokenizer):
    program = (
        "from megazebra.data.prepare.encoders.tokenizer import *; "
        "texts = [f'def function_{n}(argument):\\n    return argument + {n}\\n' for n in range(200)]; "
        "import hashlib; print(hashlib.sha256(serialize(train_byte_level_bpe(texts, 300))).hexdigest())"
    )
    root = Path(__file__).parents[4]
    found = subprocess.run([sys.executable, "-c", program], cwd=root, check=True, capture_output=True, text=True)
    assert found.stdout.strip() == tokenizer_fingerprint(tokenizer)


def test_truncation_of_a_tokenizer_file_is_not_obeyed(tokenizer, tmp_path):
    cutting = train_byte_level_bpe(TEXTS, 300)
    cutting.enable_truncation(4)
    cutting.enable_padding(length=8)
    cutting.save(str(tmp_path / "cutting.json"))
    assert load_tokenizer(tmp_path / "cutting.json").encode(TEXT).ids == tokenizer.encode(TEXT).ids


def test_unusable_tokenizers_are_refused(tokenizer, tmp_path):
    with pytest.raises(CorpusError, match="at least 257"):
        train_byte_level_bpe(TEXTS, 256)
    with pytest.raises(CorpusError, match="cannot be read"):
        load_tokenizer(tmp_path / "nowhere.json")
    for content in (b"", b"{}", b"\xff\xfe", b'{"model": {"type": "BPE"}}'):
        (tmp_path / "bad.json").write_bytes(content)
        with pytest.raises(CorpusError, match="is no tokenizer"):
            load_tokenizer(tmp_path / "bad.json")
    with pytest.raises(CorpusError, match=r"no token '</s>' .* \(<\|endoftext\|>\) with --eod"):
        eod_id(tokenizer, "</s>")
