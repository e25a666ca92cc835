"""Chat templates in Jinja, as Hugging Face tokenizers bring them, rendered by transformers."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megazebra.data.errors import CorpusError
from megazebra.data.prepare.chat.conversations import Message

# What templates mark turns with; most are special tokens of the tokenizer.
MARKER = re.compile(r"<\|[^\s|<>]+\|>|</?s>|<(?:bos|eos|start_of_turn|end_of_turn)>|\[/?INST\]")
GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")


class ConversationError(ValueError):
    """The template has no form for this conversation. reason, details: as of Refused."""

    def __init__(self, reason: str, details: str = "") -> None:
        super().__init__(reason, details)
        self.reason = reason
        self.details = details


class JinjaTemplate:
    """A ChatTemplate.

    config: of tokenizer_config.json; its tokens are the template's variables (bos_token, eos_token, ...).

    What the assistant says stands in `{% generation %}` blocks. Without them it is what an answer adds to the text
    of the messages before it and the generation prompt; white space after the end-of-turn token is left out.
    That takes two more renderings for every answer, and every text has to begin like the next one.

    Templates are programs of others: transformers renders them in Jinja's sandbox, which keeps them from Python's
    objects and from files. A template that takes its time is not stopped.

    Raises CorpusError without transformers, and where the template needs tokens that config lacks.
    """

    def __init__(self, name: str, source: str, config: dict[str, Any]) -> None:
        try:
            from jinja2 import TemplateError, TemplateSyntaxError
            from transformers.utils.chat_template_utils import render_jinja_template
        except ImportError as error:
            raise CorpusError(
                f"the chat template {name} needs transformers ({error}); install megazebra[hf], or name a built-in one"
            ) from error
        self.name = name
        self._source = source
        self._render = render_jinja_template
        # Templates are programs that reckon with some shape of messages: what they raise on others is of any kind.
        self._rejections = (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError,
                            RecursionError, MemoryError)  # fmt: skip
        self._syntax_error = TemplateSyntaxError
        self._marks_answers = bool(GENERATION_BLOCK.search(source))
        self._tokens = {key: value for key, value in config.items() if key.endswith("_token") and value}
        printed = set(re.findall(r"\b\w+_token\b", source))
        texts = {key for key, value in self._tokens.items() if isinstance(value, str)}
        self.markers = frozenset(MARKER.findall(source)) | {self._tokens[key] for key in printed & texts}
        if printed and not config:
            raise CorpusError(
                f"the chat template {name} prints {' and '.join(sorted(printed))}, which tokenizer_config.json would "
                "name; put it beside tokenizer.json"
            )
        self.fingerprint = hashlib.sha256(json.dumps([source, self._tokens], sort_keys=True).encode()).hexdigest()

    def render(self, messages: Sequence[Message]) -> tuple[str, list[tuple[int, int]]]:
        if self._marks_answers:
            return self._rendered(messages, marks=True)
        text, _ = self._rendered(messages)
        answers = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
        return text, [self._answer(text, messages[: place + 1]) for place in answers]

    def _answer(self, text: str, messages: Sequence[Message]) -> tuple[int, int]:
        """Where in the whole text the last of these messages is said."""
        asked, _ = self._rendered(messages[:-1], prompt=True)
        answered, _ = self._rendered(messages)
        if not (answered.startswith(asked) and text.startswith(answered)):
            raise CorpusError(
                f"the chat template {self.name} prints messages otherwise when others follow, so what the assistant "
                "says cannot be told from it; put {% generation %} blocks into it, or name a built-in template"
            )
        said = answered[len(asked) :]
        has_end_token = not said.rstrip().endswith(messages[-1]["content"].rstrip())
        return len(asked), len(asked) + len(said.rstrip() if has_end_token else said)

    def _rendered(
        self, messages: Sequence[Message], *, prompt: bool = False, marks: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        try:
            texts, spans = self._render(
                [list(messages)],
                chat_template=self._source,
                add_generation_prompt=prompt,
                return_assistant_tokens_mask=marks,
                **self._tokens,
            )
        except self._syntax_error as error:
            raise CorpusError(f"the chat template {self.name} is no Jinja template ({error})") from error
        except self._rejections as error:
            raise ConversationError("is rejected by the chat template", str(error)) from error
        return texts[0], spans[0] if marks else []


def tokenizer_template(folder: str | Path, config: dict[str, Any]) -> str:
    """The source of the template a tokenizer's folder brings. Raises CorpusError where it brings none."""
    file = Path(folder, "chat_template.jinja")
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise CorpusError(f"{file} is not UTF-8 ({error}); restore it") from error
    given = config.get("chat_template")
    if isinstance(given, list):  # several, by name
        named = [each for each in given if isinstance(each, dict) and each.get("name") == "default"]
        given = named[-1].get("template") if named else None
    if not isinstance(given, str):
        raise CorpusError(
            f"the tokenizer in {folder} brings no chat template: neither chat_template.jinja nor tokenizer_config.json "
            "has one; name a built-in template or a .jinja file"
        )
    return given
