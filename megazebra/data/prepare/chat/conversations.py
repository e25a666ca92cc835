"""Records of instruction data, in the shapes they are published in, as one list of messages."""

from __future__ import annotations

from typing import Any

from megazebra.data.prepare.encoders.encoded import Refused

Message = dict[str, str]
"""`role`: system, user, assistant or tool. `content`: text."""

ROLES = {
    "system": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    # ShareGPT's names
    "human": "user",
    "gpt": "assistant",
}
MAY_BE_EMPTY = ("system", "tool")
# What a template may print besides roles and contents. Going on without would train on half of a conversation.
NOT_SUPPORTED = ("tools", "tool_calls", "function_call", "functions")


def read_conversation(record: Any, key: str = "messages") -> list[Message] | Refused:
    """The messages of a parsed JSON record, or why it can't be used.

    Shapes: `key` or `conversations` with a list of {role, content} or of ShareGPT's {from, value}; {prompt,
    response} or {prompt, completion}; Alpaca's {instruction, input, output}, whose input follows the instruction
    after an empty line. The last two may bring a `system` text. A content is a text, or a list of {"type": "text",
    "text": ...}.
    """
    if not isinstance(record, dict):
        return Refused("is no JSON object")
    for name in (key, "conversations"):
        if record.get(name) is not None:
            return _messages(record, record[name], name)
    for question, answers in (("prompt", ("response", "completion")), ("instruction", ("output",))):
        for answer in answers:
            if question in record and answer in record:
                return _exchange(record, question, answer)
    return Refused(f"has no {key!r}, and no prompt with a response")


def _messages(record: dict[str, Any], entries: Any, name: str) -> list[Message] | Refused:
    if not isinstance(entries, list) or not entries:
        return Refused(f"has no messages in {name!r}")
    if refused := _unsupported(record):
        return refused
    messages: list[Message] = []
    for number, entry in enumerate(entries, 1):
        message = _message(entry, number)
        if isinstance(message, Refused):
            return message
        messages.append(message)
    if all(message["role"] != "assistant" for message in messages):
        return Refused("has no message of the assistant")
    return messages


def _message(entry: Any, number: int) -> Message | Refused:
    if not isinstance(entry, dict):
        return Refused("has a message that is no JSON object", f"message {number}")
    if refused := _unsupported(entry):
        return refused
    given = entry.get("role", entry.get("from"))
    role = ROLES.get(given) if isinstance(given, str) else None
    if role is None:
        return Refused("has an unknown role", f"{given!r} in message {number}")
    content = _text(entry.get("content", entry.get("value")))
    if isinstance(content, Refused):
        return Refused(content.reason, f"{content.details} in message {number} ({role})")
    if not content.strip() and role not in MAY_BE_EMPTY:
        return Refused("has a message without content", f"message {number} ({role})")
    return {"role": role, "content": content}


def _unsupported(fields: dict[str, Any]) -> Refused | None:
    present = [name for name in NOT_SUPPORTED if fields.get(name)]
    return Refused(f"has {present[0]!r}, which is not supported") if present else None


def _text(content: Any) -> str | Refused:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        return Refused("has content that is not text", type(content).__name__)
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else part
            return Refused("has content with a part that is not text", repr(kind))
    return "".join(part["text"] for part in content)


def _exchange(record: dict[str, Any], question: str, answer: str) -> list[Message] | Refused:
    """One question and its answer."""
    system, further = record.get("system"), record.get("input") if question == "instruction" else None
    texts = {question: record[question], answer: record[answer], "system": system or "", "input": further or ""}
    for name, text in texts.items():
        if not isinstance(text, str) or (name in (question, answer) and not text.strip()):
            return Refused(f"has no text in {name!r}")
    asked = texts[question] + (f"\n\n{texts['input']}" if texts["input"] else "")
    exchange = [{"role": "user", "content": asked}, {"role": "assistant", "content": texts[answer]}]
    return [{"role": "system", "content": texts["system"]}, *exchange] if system else exchange
