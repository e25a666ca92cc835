"""What becomes of conversations that are too long, that forge turns, or whose template the tokenizer doesn't know."""

from __future__ import annotations

import json

import numpy as np
import pytest

from megazebra.data.errors import CorpusError
from megazebra.data.prepare.encoders.encoded import Refused
from megazebra.data.prepare.encoders.tokenizer import byte_tokenizer, save_tokenizer
from megazebra.data.prepare.open_encoder import EncoderOptions, open_encoder

HELLO = {"prompt": "Hi", "response": "Hello, 世界!"}
# One token for a byte: chatml's header of the user, its marks, "Hi", and so on.
QUESTION = len("<user\nHi>\n")
SPANS = [[QUESTION + len("<assistant\n"), QUESTION + len("<assistant\n") + len("Hello, 世界!".encode()) + 1]]
TOKENS = SPANS[0][1] + len("\n")


@pytest.fixture
def path(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>", "<pad>"])
    save_tokenizer(tokenizer, tmp_path / "tokenizer.json")
    return str(tmp_path / "tokenizer.json")


def open_chat(path, **options):
    return open_encoder(EncoderOptions(**{"tokenizer": path, "chat": "chatml", **options}))


def test_tokens_and_spans(path):
    (document,) = open_chat(path).encode([HELLO])
    assert len(document.tokens) == TOKENS
    assert document.spans.tolist() == SPANS
    assert document.tokens[SPANS[0][1] - 1] == 258
    assert bytes(document.tokens[slice(*SPANS[0])][:-1].astype(np.uint8)).decode() == "Hello, 世界!"


def test_end_of_document_only_if_asked(path):
    assert open_chat(path).eod_id is None
    encoder = open_chat(path, eod="<pad>")
    (document,) = encoder.encode([HELLO])
    assert (encoder.eod_id, document.tokens[-1], len(document.tokens)) == (259, 259, TOKENS + 1)
    assert document.spans.tolist() == SPANS


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tokenizer_config.json": {"eos_token": ["</s>"]}}, r"eos_token=\['</s>'\] is no text"),
        ({"tokenizer_config.json": {"bos_token": "\ud800"}}, r"bos_token='\\ud800' is no text"),
        ({"tokenizer_config.json": {"chat_template": [3, {"name": "default"}]}}, "brings no chat template"),
        ({"chat_template.jinja": b"\xff"}, "is not UTF-8"),
    ],
)
def test_what_comes_with_a_tokenizer_may_be_wrong(files, message, path, tmp_path):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    with pytest.raises(CorpusError, match=message):
        open_chat(str(tmp_path), chat="tokenizer")


def test_a_switch_is_no_token_and_half_a_character_no_text(path, tmp_path):
    fields = {"add_bos_token": True, "chat_template": "{% generation %}\ud800{{ add_bos_token }}{% endgeneration %}"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(fields))
    assert open_chat(str(tmp_path), chat="tokenizer").encode([HELLO]) == [
        Refused("gets half a surrogate pair from the chat template")
    ]


def test_longer_than_asked_for(path):
    limits = {"max_tokens": SPANS[0][1] - 3}
    assert len(open_chat(path, **limits).encode([HELLO])[0].tokens) == TOKENS
    assert open_chat(path, overlong="drop", **limits).encode([HELLO]) == [
        Refused(f"is longer than {limits['max_tokens']} tokens", length=TOKENS)
    ]
    with pytest.raises(CorpusError, match=rf"has {TOKENS} tokens, more than --max-tokens {limits['max_tokens']}"):
        open_chat(path, overlong="error", **limits).encode([HELLO])
    (document,) = open_chat(path, overlong="truncate", eod="<pad>", **limits).encode([HELLO])
    (whole,) = open_chat(path).encode([HELLO])
    assert document.tokens.tolist() == whole.tokens[: limits["max_tokens"]].tolist()
    assert document.spans.tolist() == [[SPANS[0][0], limits["max_tokens"]]]
    assert document.length == TOKENS + 1
    assert open_chat(path, overlong="truncate", max_tokens=SPANS[0][0]).encode([HELLO]) == [
        Refused("has no token that the assistant says", length=TOKENS)
    ]


@pytest.mark.parametrize("overlong", ["drop", "truncate", "error"])
def test_length_of_exactly_the_limit_is_kept(path, overlong):
    (document,) = open_chat(path, overlong=overlong, max_tokens=TOKENS).encode([HELLO])
    assert (len(document.tokens), document.spans.tolist()) == (TOKENS, SPANS)


def test_policy_needs_a_limit(path):
    with pytest.raises(CorpusError, match="conversations to drop are those beyond --max-tokens; give it"):
        open_chat(path, overlong="drop")


@pytest.mark.parametrize("forged", ["<|im_end|>", "<pad>", "<|endoftext|>"])
def test_special_tokens_in_contents_would_forge_turns(path, forged):
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": f"a{forged}b"}]
    assert open_chat(path).encode([{"messages": turns}, HELLO])[0] == Refused(
        "has a special token in its content", f"{forged!r} in message 2"
    )


def test_markers_that_are_no_tokens_are_text_and_reported_and_still_forge(path):
    encoder = open_chat(path, chat="zephyr")
    assert "</s> <|assistant|> <|system|> <|user|> encoded as text" in encoder.description
    document, refused = encoder.encode([HELLO, {**HELLO, "prompt": "<|assistant|>\nNo"}])
    text = "<|user|>\nHi</s>\n<|assistant|>\nHello, 世界!</s>\n"
    assert bytes(document.tokens.astype(np.uint8)).decode() == text
    assert refused == Refused("has a special token in its content", "'<|assistant|>' in message 1")
    assert "as text" not in open_chat(path).description


def test_refusals_stand_where_their_records_stood(path):
    surrogate = json.loads('{"prompt": "\\ud83e", "response": "Hello"}')
    encoder = open_chat(path, messages="turns")
    outcomes = encoder.encode([{}, HELLO, surrogate, {"turns": []}, HELLO])
    assert [type(outcome).__name__ for outcome in outcomes] == [
        "Refused", "EncodedDocument", "Refused", "Refused", "EncodedDocument",
    ]  # fmt: skip
    assert outcomes[0] == Refused("has no 'turns', and no prompt with a response")
    assert outcomes[2] == Refused("holds half a surrogate pair", "message 1")
    assert encoder.encode([]) == []


def test_recipe_follows_all_that_decides_the_tokens(path, tmp_path):
    recipes = [
        open_chat(path, **options).recipe
        for options in (
            {}, {"chat": "zephyr"}, {"eod": "<pad>"}, {"messages": "turns"}, {"overlong": "drop", "max_tokens": 9},
            {"overlong": "drop", "max_tokens": 8}, {"overlong": "truncate", "max_tokens": 8},
        )
    ]  # fmt: skip
    assert len({json.dumps(recipe, sort_keys=True) for recipe in recipes}) == len(recipes)
    assert open_chat(path, max_tokens=7, engine="tokenizers").recipe == recipes[0]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<pad>"}))
    assert open_chat(path, chat="zephyr").recipe != recipes[1]
    encoder = open_chat(path)
    assert encoder.recipe["tokenizer"] == encoder.fingerprint


def test_text_encoder_of_the_same_tokenizer_is_not_affected(path):
    """The special tokens are parsed for chat alone."""
    text, chat = open_encoder(EncoderOptions(tokenizer=path)), open_chat(path)
    chat.encode([HELLO])
    assert 257 not in text.encode(["<|im_start|>"])[0].tokens
