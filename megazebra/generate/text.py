"""Prompts to token ids and new ids to text: which tokenizer a model has, its chat template, text as it comes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megazebra.checkpoint.reader import TrainingCheckpoint
from megazebra.config.schema import Config
from megazebra.data.corpus.indexed_corpus import Corpus
from megazebra.data.errors import CorpusError
from megazebra.data.prepare.chat.chat_template import ChatTemplate, open_chat_template
from megazebra.data.prepare.chat.conversations import Message
from megazebra.data.prepare.chat.jinja_template import ConversationError
from megazebra.data.prepare.decoding import Decode, open_decoder, own_tokenizer
from megazebra.data.prepare.encoders.tokenizer import EOD_TOKEN, load_sentencepiece, load_tokenizer, tokenizer_config
from megazebra.errors import UserError
from megazebra.hf.companions import generation_config

Encode = Callable[[str, bool], list[int]]

_NAMES = ("tokenizer.json", "tokenizer.model")
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # what a decoder gives for a part of a character


@dataclass(frozen=True)
class TokenizerFile:
    """path: a tokenizer.json or a sentencepiece .model. eos_ids: tokens that end a text. specials: a text is begun as
    the tokenizer begins one (Llama's <s>), as models want it that bring their tokenizer; the corpora of our own runs
    are encoded without.
    """

    path: Path
    eos_ids: frozenset[int]
    specials: bool


def find_tokenizer(model: Path, named: Path | None) -> TokenizerFile:
    """The tokenizer named, else the one in the model's folder, else that of the corpus the run was trained on.

    Raises UserError when there is none, or it is not what the corpus was made with.
    """
    place = named or model
    path = place if place.is_file() else next((place / name for name in _NAMES if (place / name).is_file()), None)
    if path is not None:
        return TokenizerFile(path, _eos_ids(path), specials=True)
    if named is not None:
        raise UserError(f"--tokenizer {named} is neither a file nor a folder with {' or '.join(_NAMES)}")
    if (model / "model.safetensors.index.json").exists():
        raise UserError(f"{model} brings no tokenizer; name the one that the model was trained with (--tokenizer)")
    prefix = _corpus_of(TrainingCheckpoint.open(model).config)
    try:
        corpus = Corpus(prefix)
        path = own_tokenizer(corpus)
    except CorpusError as error:
        raise UserError(
            f"{model} was trained on {prefix}, whose tokenizer cannot be had: {error}; or use --tokenizer"
        ) from error
    if path is None or corpus.meta is None:
        raise UserError(f"{model} was trained on {prefix}, beside which there is no tokenizer; name one (--tokenizer)")
    end = corpus.meta.eod_id
    return TokenizerFile(path, _eos_ids(path) if end is None else frozenset([end]), specials=False)


class Text:
    """What a model reads and writes, as text.

    chat: None for plain text, else a chat template as `data.prepare.chat` names them.
    eos_ids: tokens that end a text or, with chat, the assistant's turn.
    Raises CorpusError when tokenizer or template cannot be read, UserError for chat without a tokenizer.json.
    """

    def __init__(self, file: TokenizerFile, chat: str | None = None) -> None:
        self.eos_ids = file.eos_ids
        self._specials = file.specials
        self._encode, self._decode = _encoder(file.path), open_decoder(file.path)
        self._template: ChatTemplate | None = None
        if chat is not None:
            if file.path.suffix == ".model":
                raise UserError(f"--chat needs a tokenizer.json, not {file.path}; give another --tokenizer")
            self._template = open_chat_template(chat, file.path.parent)
            self.eos_ids |= self._ends_of_turn(self._template)

    def prompt(self, text: str, specials: bool | None = None) -> list[int]:
        """The ids of a text that the model goes on with; specials: begun otherwise than the file says."""
        return self._encode(text, self._specials if specials is None else specials)

    def conversation(self, messages: Sequence[Message]) -> list[int]:
        """The ids up to where the assistant speaks next. Raises UserError where the template has no form for them."""
        assert self._template is not None, "made without a chat template"
        try:  # what training has before an answer, whatever the answer
            text, answers = self._template.render([*messages, {"role": "assistant", "content": "."}])
        except ConversationError as error:
            raise UserError(f"a conversation {error.reason} {error.details}".rstrip()) from error
        return self._encode(text[: answers[-1][0]], False)

    def decode(self, ids: Sequence[int]) -> str:
        """Text without the token that ended it; other special tokens are shown."""
        return self._decode([token for token in ids if token not in self.eos_ids])

    def stream(self) -> TextStream:
        return TextStream(self.decode)

    def _ends_of_turn(self, template: ChatTemplate) -> frozenset[int]:
        """The special token after what the assistant says, where the template has one."""
        text, answers = template.render([{"role": "user", "content": "."}, {"role": "assistant", "content": "."}])
        said, first = text[slice(*answers[-1])], answers[-1][0]
        ids = self._encode(text[first + said.index(".") + 1 : answers[-1][1]].strip(), False)
        return frozenset(ids) if len(ids) == 1 else frozenset()


class TextStream:
    """Text of tokens that come one by one. A token may hold a part of a character, or change the space before it: new
    text is what the last tokens say beyond those of them that have been shown.
    """

    def __init__(self, decode: Decode) -> None:
        self._decode = decode
        self._ids: list[int] = []  # from the tokens shown last
        self._shown = 0  # of these ids

    def push(self, token: int) -> str:
        """The text that the token completes; '' while a character is incomplete."""
        self._ids.append(token)
        text = self._decode(self._ids)
        return "" if text.endswith(_INCOMPLETE) else self._new(text)

    def end(self) -> str:
        """What is left, complete or not."""
        return self._new(self._decode(self._ids))

    def _new(self, text: str) -> str:
        new = text[len(self._decode(self._ids[: self._shown])) :]
        if new:
            self._ids, self._shown = self._ids[self._shown :], len(self._ids) - self._shown
        return new


def _encoder(path: Path) -> Encode:
    """Text to ids; special tokens that the text spells are these tokens (of a tokenizer.json)."""
    if path.suffix == ".model":
        model = load_sentencepiece(path)
        return lambda text, specials: model.encode(text, add_bos=specials and model.bos_id() >= 0)
    tokenizer = load_tokenizer(path)
    tokenizer.encode_special_tokens = False
    return lambda text, specials: tokenizer.encode(text, add_special_tokens=specials).ids


def _eos_ids(path: Path) -> frozenset[int]:
    """What the folder says ends a text, else the tokenizer's own end."""
    given = generation_config(path.parent).get("eos_token_id")
    if given is not None:
        return frozenset([given] if isinstance(given, int) else given)
    if path.suffix == ".model":
        found = load_sentencepiece(path).eos_id()
        return frozenset([found] if found >= 0 else [])
    name = tokenizer_config(path.parent).get("eos_token") or EOD_TOKEN
    end = load_tokenizer(path).token_to_id(name)
    return frozenset([] if end is None else [end])


def _corpus_of(config: Config) -> str:
    """The prefix of the (first) training corpus."""
    if config.data.path is not None:
        return config.data.path
    return next(iter(config.data.sources.values())).path
