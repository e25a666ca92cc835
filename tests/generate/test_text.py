"""Which tokenizer a model has, prompts as training has them, and text from tokens that come one by one."""

from __future__ import annotations

import hashlib
import json
import types
from pathlib import Path
from typing import Any

import pytest
from hf.hf_models import save_ours
from support.training import tiny_config
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from megazebra.checkpoint.reader import TrainingCheckpoint
from megazebra.data.corpus.corpus_writer import CorpusWriter
from megazebra.data.prepare.encoders.tokenizer import byte_tokenizer, save_tokenizer
from megazebra.data.prepare.open_encoder import EncoderOptions, open_encoder
from megazebra.errors import UserError
from megazebra.generate.text import Text, TextStream, TokenizerFile, find_tokenizer

EOD = 256  # of the byte tokenizer; its ids below are the bytes
ENGLISH, JAPANESE = "größer 🦓", "日本"


def bos_tokenizer() -> Tokenizer:
    """Bytes, and texts that begin with <s>, as Llama's tokenizer has it."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens(["<s>", "</s>", "<|im_start|>", "<|im_end|>"])
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", EOD + 1)])
    return tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_tokenizer(bos_tokenizer(), tmp_path / "tokenizer.json")
    return tmp_path


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run's folder whose checkpoint names a corpus that has its tokenizer beside it."""
    (tmp_path / "corpus").mkdir()
    save_tokenizer(bos_tokenizer(), tmp_path / "corpus" / "tokenizer.json")
    fingerprint = hashlib.sha256((tmp_path / "corpus" / "tokenizer.json").read_bytes()).hexdigest()
    with CorpusWriter(tmp_path / "corpus" / "train", vocab_size=EOD + 5, eod_id=EOD + 2) as writer:
        writer.add_document([1, 2, EOD + 2])
        writer.record(tokenizer={"path": "tokenizer.json", "fingerprint": fingerprint})
    config = tiny_config(data__path=str(tmp_path / "corpus" / "train"))
    monkeypatch.setattr(TrainingCheckpoint, "open", lambda path: types.SimpleNamespace(config=config))
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def test_a_models_own_tokenizer(folder: Path) -> None:
    for model, named in ((folder, None), (Path("elsewhere"), folder), (Path("elsewhere"), folder / "tokenizer.json")):
        file = find_tokenizer(model, named)
        assert file == TokenizerFile(folder / "tokenizer.json", frozenset([EOD]), specials=True)
    text = Text(file)
    assert text.prompt("Hi</s>") == [EOD + 1, *b"Hi", EOD + 2]
    assert text.decode([*JAPANESE.encode(), EOD]) == JAPANESE


def test_the_tokenizer_of_a_runs_corpus(run: Path) -> None:
    file = find_tokenizer(run, None)
    assert (file.path.parent.name, file.eos_ids) == ("corpus", {EOD + 2})
    # The corpus was encoded without <s>.
    assert Text(file).prompt("Hi") == list(b"Hi")


def test_a_tokenizer_that_cannot_be_had(run: Path, tmp_path: Path) -> None:
    tokenizer = tmp_path / "corpus" / "tokenizer.json"
    save_tokenizer(byte_tokenizer(), tokenizer)
    with pytest.raises(UserError, match=r"is not the tokenizer that .* was made with"):
        find_tokenizer(run, None)
    tokenizer.unlink()
    with pytest.raises(UserError, match="beside which there is no tokenizer"):
        find_tokenizer(run, None)
    (tmp_path / "corpus" / "train.bin").unlink()
    with pytest.raises(UserError, match=r"train.bin does not exist; .*; or use --tokenizer"):
        find_tokenizer(run, None)
    with pytest.raises(UserError, match=r"is neither a file nor a folder with tokenizer.json or tokenizer.model"):
        find_tokenizer(run, run)
    save_ours(tmp_path / "model")
    with pytest.raises(UserError, match="brings no tokenizer"):
        find_tokenizer(tmp_path / "model", None)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, {EOD}),
        ({"tokenizer_config.json": {"eos_token": "</s>"}}, {EOD + 2}),
        ({"tokenizer_config.json": {"eos_token": {"content": "</s>"}}}, {EOD + 2}),
        ({"tokenizer_config.json": {"eos_token": "</s>"}, "generation_config.json": {"eos_token_id": 9}}, {9}),
        ({"generation_config.json": {"eos_token_id": [9, EOD]}}, {9, EOD}),
        ({"tokenizer_config.json": {"eos_token": "<nothing>"}}, set()),
    ],
)
def test_what_ends_a_text(files: dict[str, Any], expected: set[int], folder: Path) -> None:
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    assert find_tokenizer(folder, None).eos_ids == expected


CONVERSATION = [
    {"role": "user", "content": ENGLISH},
    {"role": "assistant", "content": JAPANESE},
    {"role": "user", "content": "And?"},
    {"role": "assistant", "content": "So."},
]
JINJA = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("template", ["chatml", "llama2", "zephyr", "alpaca", "tokenizer"])
def test_the_assistant_is_asked_as_in_training(template: str, folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(JINJA)
    encoder = open_encoder(EncoderOptions(tokenizer=str(folder), chat=template, threads=1))
    (trained,) = encoder.encode([{"messages": CONVERSATION}])
    text = Text(find_tokenizer(folder, None), template)
    for turns, (begins, ends) in zip((1, 3), trained.spans.tolist(), strict=True):
        assert text.conversation(CONVERSATION[:turns]) == trained.tokens[:begins].tolist()
        # What the assistant is trained to say last ends its turn.
        assert trained.tokens[ends - 1] in text.eos_ids


def test_conversations_without_a_form_are_named(folder: Path) -> None:
    text = Text(find_tokenizer(folder, None), "llama2")
    with pytest.raises(UserError, match="user and assistant not take turns"):
        text.conversation([CONVERSATION[0], CONVERSATION[2]])


def test_characters_come_when_they_are_complete(folder: Path) -> None:
    text = Text(find_tokenizer(folder, None))
    stream = text.stream()
    pieces = [stream.push(token) for token in ENGLISH.encode()]
    assert "".join(pieces) == ENGLISH
    assert [piece for piece in pieces if piece] == list(ENGLISH)
    assert stream.push(EOD) == stream.end() == ""
    assert stream.push("日".encode()[0]) == ""
    assert stream.end() == "\N{REPLACEMENT CHARACTER}"


def test_spaces_that_belong_to_the_next_word_are_kept() -> None:
    """As sentencepiece decodes: the first word loses the space before it."""
    words = ["▁Once", "▁up", "on", "▁a", "▁time"]
    stream = TextStream(lambda ids: "".join(words[each] for each in ids).replace("▁", " ").removeprefix(" "))
    assert [stream.push(each) for each in range(5)] == ["Once", " up", "on", " a", " time"]


def test_sentencepiece(tmp_path: Path) -> None:
    trainer = pytest.importorskip("sentencepiece").SentencePieceTrainer
    sentences = [f"function {n} returns its argument plus {n}" for n in range(200)]
    trainer.train(
        sentence_iterator=iter(sentences), model_prefix=str(tmp_path / "tokenizer"), vocab_size=300,
        byte_fallback=True, minloglevel=2,
    )  # fmt: skip
    file = find_tokenizer(tmp_path, None)
    text = Text(file)
    ids = text.prompt(sentences[7])
    assert (file.eos_ids, ids[0]) == ({2}, 1)
    stream = text.stream()
    assert "".join(stream.push(token) for token in ids[1:]) + stream.end() == sentences[7] == text.decode([*ids[1:], 2])
    with pytest.raises(UserError, match=r"--chat needs a tokenizer\.json"):
        Text(file, "chatml")
