"""Every published shape of a conversation becomes the same messages, and what is unusable says why."""

from __future__ import annotations

import pytest

from megazebra.data.prepare.chat.conversations import read_conversation
from megazebra.data.prepare.encoders.encoded import Refused

QUESTION, ANSWER = {"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}
SYSTEM = {"role": "system", "content": "Be brief."}


def messages(*entries):
    return {"messages": list(entries)}


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (messages(SYSTEM, QUESTION, ANSWER), [SYSTEM, QUESTION, ANSWER]),
        ({"conversations": [SYSTEM, QUESTION, ANSWER]}, [SYSTEM, QUESTION, ANSWER]),
        (
            {"conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]},
            [QUESTION, ANSWER],
        ),
        (
            {
                "conversations": [{"from": "system", "value": "Be brief."}, {"from": "gpt", "value": "4"}],
                "messages": None,
            },
            [SYSTEM, ANSWER],
        ),
        ({"prompt": "2 + 2?", "response": "4"}, [QUESTION, ANSWER]),
        ({"prompt": "2 + 2?", "completion": "4", "system": "Be brief."}, [SYSTEM, QUESTION, ANSWER]),
        ({"instruction": "2 + 2?", "output": "4"}, [QUESTION, ANSWER]),
        ({"instruction": "2 + 2?", "input": "", "output": "4", "system": ""}, [QUESTION, ANSWER]),
        (
            {"instruction": "Add.", "input": "2, 2", "output": "4"},
            [{"role": "user", "content": "Add.\n\n2, 2"}, ANSWER],
        ),
    ],
)
def test_shapes(record, expected):
    assert read_conversation(record) == expected


def test_key_of_the_messages():
    record = {"messages": "something else", "turns": [QUESTION, ANSWER]}
    assert read_conversation(record, "turns") == [QUESTION, ANSWER]
    assert read_conversation({"turns": [QUESTION, ANSWER]}) == Refused(
        "has no 'messages', and no prompt with a response"
    )


def test_parts_of_text_are_joined_and_other_fields_left_out():
    parts = [{"type": "text", "text": "2 + "}, {"type": "text", "text": "2?"}]
    record = {"id": 7, "tools": [], **messages({"role": "user", "content": parts, "name": "Ada"}, ANSWER)}
    assert read_conversation(record) == [QUESTION, ANSWER]


def test_system_and_tool_may_say_nothing():
    silent = [{"role": "system", "content": ""}, QUESTION, {"role": "tool", "content": ""}, ANSWER]
    assert read_conversation(messages(*silent)) == silent


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ("text", "is no JSON object"),
        (None, "is no JSON object"),
        ({}, "has no 'messages', and no prompt with a response"),
        ({"text": "2 + 2 = 4"}, "has no 'messages', and no prompt with a response"),
        ({"prompt": "2 + 2?"}, "has no 'messages', and no prompt with a response"),
        (messages(), "has no messages in 'messages'"),
        ({"conversations": "2 + 2?"}, "has no messages in 'conversations'"),
        (messages(QUESTION), "has no message of the assistant"),
        (messages(QUESTION, {**ANSWER, "tool_calls": [{}]}), "has 'tool_calls', which is not supported"),
        ({"tools": [{"name": "add"}], **messages(QUESTION, ANSWER)}, "has 'tools', which is not supported"),
        ({"prompt": [QUESTION], "completion": [ANSWER]}, "has no text in 'prompt'"),
        ({"prompt": "2 + 2?", "response": ""}, "has no text in 'response'"),
        ({"instruction": "Add.", "input": 2, "output": "4"}, "has no text in 'input'"),
    ],
)
def test_unusable_records_say_why(record, reason):
    assert read_conversation(record) == Refused(reason)


@pytest.mark.parametrize(
    ("message", "reason", "details"),
    [
        ("4", "has a message that is no JSON object", "message 2"),
        ({"role": "bot", "content": "4"}, "has an unknown role", "'bot' in message 2"),
        ({"role": ["assistant"], "content": "4"}, "has an unknown role", "['assistant'] in message 2"),
        ({"content": "4"}, "has an unknown role", "None in message 2"),
        ({"role": "assistant", "content": " \n"}, "has a message without content", "message 2 (assistant)"),
        ({"role": "user", "content": []}, "has a message without content", "message 2 (user)"),
        ({"role": "assistant", "content": None}, "has content that is not text", "NoneType in message 2 (assistant)"),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": "x"}]},
            "has content with a part that is not text",
            "'image_url' in message 2 (user)",
        ),
        ({"role": "user", "content": ["2"]}, "has content with a part that is not text", "'2' in message 2 (user)"),
    ],
)
def test_unusable_messages_are_told_apart_by_details_alone(message, reason, details):
    """Reasons are counted: they must not differ from record to record."""
    assert read_conversation(messages(QUESTION, message, ANSWER)) == Refused(reason, details)
