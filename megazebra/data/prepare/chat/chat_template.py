"""Conversations to one text, and where in it the assistant speaks."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from megazebra.data.errors import CorpusError
from megazebra.data.prepare.chat.conversations import Message
from megazebra.data.prepare.chat.jinja_template import MARKER, ConversationError, JinjaTemplate, tokenizer_template
from megazebra.data.prepare.encoders.tokenizer import EOD_TOKEN, tokenizer_config

FROM_TOKENIZER = "tokenizer"


class ChatTemplate(Protocol):
    """Messages to text.

    name: for people. fingerprint: sha256 over all that decides the text. markers: what sets its turns apart, most of
    it meant to be special tokens of the tokenizer.
    """

    @property
    def name(self) -> str: ...

    @property
    def fingerprint(self) -> str: ...

    @property
    def markers(self) -> frozenset[str]: ...

    def render(self, messages: Sequence[Message]) -> tuple[str, list[tuple[int, int]]]:
        """The text, and [start, end) in characters of what the assistant says, its end-of-turn token included.

        Raises ConversationError where the template has no form for these messages.
        """
        ...


@dataclass(frozen=True)
class Turn:
    """How a message is printed: before, body, after. The assistant's body is what it says; {content} the message."""

    before: str
    body: str
    after: str = ""


@dataclass(frozen=True)
class TurnTemplate:
    """A built-in template: what opens the text, then one turn for each message.

    {bos} and {eos} stand for the tokenizer's tokens. first_user: replaces the turn of the system message by what
    comes before the first user message's content; {system} is the system message. default_system: where none is
    given. strip: white space around contents goes. alternate: user and assistant have to take turns.
    """

    name: str
    turns: dict[str, Turn]
    opening: str = ""
    first_user: str | None = None
    default_system: str | None = None
    strip: bool = False
    alternate: bool = False
    bos: str = "<s>"
    eos: str = "</s>"

    @property
    def markers(self) -> frozenset[str]:
        printed = [self.opening, *(f"{turn.before}{turn.body}{turn.after}" for turn in self.turns.values())]
        tokens = {token for key, token in (("{bos}", self.bos), ("{eos}", self.eos)) if key in "".join(printed)}
        return frozenset(marker for text in printed for marker in MARKER.findall(text)) | tokens

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(dataclasses.asdict(self), sort_keys=True).encode()).hexdigest()

    def render(self, messages: Sequence[Message]) -> tuple[str, list[tuple[int, int]]]:
        text = self._with_tokens(self.opening)
        spans = []
        for message in self._arranged(list(messages)):
            turn = self.turns.get(message["role"])
            if turn is None:
                raise ConversationError(f"has a {message['role']} message, which the {self.name} template cannot print")
            content = message["content"].strip() if self.strip else message["content"]
            before, body, after = map(self._with_tokens, (turn.before, turn.body, turn.after))
            start = len(text) + len(before)
            text += before + body.replace("{content}", content)
            if message["role"] == "assistant":
                spans.append((start, len(text)))
            text += after
        return text, spans

    def _arranged(self, messages: list[Message]) -> list[Message]:
        """The messages as turns: the system message where the template has it, the order as it wants it."""
        if self.default_system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.default_system}, *messages]
        if self.first_user is not None and messages[0]["role"] == "system":
            system, first, *others = messages
            opening = self.first_user.replace("{system}", system["content"])
            messages = [{**first, "content": opening + first["content"]}, *others]
        if self.alternate:
            roles = [message["role"] for message in messages if message["role"] != "system"]
            if any(role != ("user", "assistant")[place % 2] for place, role in enumerate(roles)):
                raise ConversationError(f"has user and assistant not take turns, as the {self.name} template demands")
        return messages

    def _with_tokens(self, text: str) -> str:
        return text.replace("{bos}", self.bos).replace("{eos}", self.eos)


def _alike(before: str, body: str, after: str = "", *, roles: str = "system user assistant tool") -> dict[str, Turn]:
    return {role: Turn(before.replace("{role}", role), body, after) for role in roles.split()}


BUILT_IN = {
    template.name: template
    for template in (
        # OpenAI's ChatML, as Qwen and many others have it.
        TurnTemplate("chatml", _alike("<|im_start|>{role}\n", "{content}<|im_end|>", "\n")),
        # meta-llama/Meta-Llama-3-8B-Instruct.
        TurnTemplate(
            "llama3",
            _alike("<|start_header_id|>{role}<|end_header_id|>\n\n", "{content}<|eot_id|>"),
            opening="{bos}",
            strip=True,
            bos="<|begin_of_text|>",
        ),
        # meta-llama/Llama-2-7b-chat-hf. The space before an answer is part of the answer's first token.
        TurnTemplate(
            "llama2",
            {"user": Turn("{bos}[INST] ", "{content}", " [/INST]"), "assistant": Turn("", " {content} {eos}")},
            first_user="<<SYS>>\n{system}\n<</SYS>>\n\n",
            strip=True,
            alternate=True,
        ),
        # HuggingFaceH4/zephyr-7b-beta.
        TurnTemplate("zephyr", _alike("<|{role}|>\n", "{content}{eos}", "\n", roles="system user assistant")),
        # tatsu-lab/stanford_alpaca; later turns go on in the same manner.
        TurnTemplate(
            "alpaca",
            {
                "system": Turn("", "{content}"),
                "user": Turn("\n\n### Instruction:\n", "{content}", "\n\n"),
                "assistant": Turn("### Response:\n", "{content}{eos}"),
            },
            default_system="Below is an instruction that describes a task. "
            "Write a response that appropriately completes the request.",
            eos=EOD_TOKEN,
        ),
    )
}


def open_chat_template(name: str, folder: str | Path) -> ChatTemplate:
    """A built-in template, the tokenizer's own (`tokenizer`), or one from a .jinja file.

    folder: of the tokenizer, where tokenizer_config.json may name bos_token, eos_token and the chat template.
    Raises CorpusError where there is no such template.
    """
    config = tokenizer_config(folder)
    if name in BUILT_IN:
        tokens = {key: config[f"{key}_token"] for key in ("bos", "eos") if config.get(f"{key}_token")}
        return dataclasses.replace(BUILT_IN[name], **tokens)
    if name == FROM_TOKENIZER:
        return JinjaTemplate(f"of {folder}", tokenizer_template(folder, config), config)
    if not name.endswith(".jinja"):
        known = ", ".join((*BUILT_IN, FROM_TOKENIZER))
        raise CorpusError(f"there is no chat template {name!r}; give one of {known}, or a .jinja file")
    try:
        return JinjaTemplate(name, Path(name).read_text(encoding="utf-8"), config)
    except OSError as error:
        raise CorpusError(f"chat template {name!r} cannot be read ({error.strerror}); correct the path") from error
    except UnicodeDecodeError as error:
        raise CorpusError(f"chat template {name!r} is not UTF-8 ({error}); restore it") from error
