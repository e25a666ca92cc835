"""Chat templates against transformers: its text from the published Jinja templates, its tokens and assistant masks."""

from __future__ import annotations

import json

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from megazebra.data.errors import CorpusError
from megazebra.data.prepare.chat.chat_template import BUILT_IN, open_chat_template
from megazebra.data.prepare.chat.jinja_template import ConversationError
from megazebra.data.prepare.encoders.encoded import Refused
from megazebra.data.prepare.encoders.tokenizer import EOD_TOKEN, save_tokenizer, train_byte_level_bpe
from megazebra.data.prepare.open_encoder import EncoderOptions, open_encoder

# As the models' pages on the Hugging Face hub have them.
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + "
    "'\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
    "{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
ZEPHYR = (
    "{% for message in messages %}\n"
    "{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'system' %}\n{{ '<|system|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n"
    "{% endif %}\n{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)
# Stanford's prompt for instructions without an input; it has been published as a Python string, not as a template.
ALPACA = (
    "{% if messages[0]['role'] != 'system' %}{{ 'Below is an instruction that describes a task. Write a response that "
    "appropriately completes the request.' }}{% endif %}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '\n\n### Instruction:\n' + message['content'] + '\n\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ '### Response:\n' + message['content'] + eos_token }}"
    "{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
)
PUBLISHED = {"chatml": CHATML, "llama3": LLAMA3, "llama2": LLAMA2, "zephyr": ZEPHYR, "alpaca": ALPACA}
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<s>", "</s>"]

# The same templates with what the assistant says marked, as transformers wants it for its masks.
MARKED = {
    "chatml": "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}",
    "llama3": "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}{% if message['role'] == 'assistant' %}"
    "{%- generation -%}{{ message['content'] | trim + '<|eot_id|>' }}{%- endgeneration -%}"
    "{% else %}{{ message['content'] | trim + '<|eot_id|>' }}{% endif %}{% endfor %}",
}


def conversation(text: str) -> list[dict[str, str]]:
    """Lines of `role: content`; \\n in a content is a line end."""
    pairs = (line.strip().split(": ", 1) for line in text.strip().splitlines())
    return [{"role": role, "content": content.replace("\\n", "\n").replace("EMPTY", "")} for role, content in pairs]


PLAIN = """
    user: What is a zebra?
    assistant: An animal with stripes.
"""
TURNS = """
    system: Answer in one word.
    user: größer 日本 🦓?\\n\\nReally?
    assistant: 日本 🦓
    user:   and then  \\n
    assistant: \\n  def f():\\n    return 'größe'\\n
"""
TOOL = """
    system: EMPTY
    user: What time is it?
    assistant: clock()
    tool: 12:00
    assistant: Noon.
    user: Thanks.
"""
CONVERSATIONS = [conversation(text) for text in (PLAIN, TURNS, TOOL)]


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = train_byte_level_bpe(
        ["What is a zebra? An animal with stripes.\n\n\n### Response:\n assistant"] * 9, 300
    )
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


@pytest.fixture(scope="module")
def reference(tokenizer):
    saved = type(tokenizer).from_str(tokenizer.to_str())
    return PreTrainedTokenizerFast(tokenizer_object=saved, bos_token="<s>", eos_token="</s>")


@pytest.fixture
def folder(tokenizer, tmp_path):
    save_tokenizer(tokenizer, tmp_path / "tokenizer.json")
    config = {"bos_token": {"content": "<s>", "lstrip": False}, "eos_token": "</s>", "pad_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return tmp_path


def encode(folder, messages, **options):
    (document,) = open_encoder(EncoderOptions(tokenizer=str(folder), **options)).encode([{"messages": messages}])
    return document


def mask(document) -> list[int]:
    said = np.zeros(len(document.tokens), dtype=int)
    for start, end in document.spans:
        said[start:end] = 1
    return said.tolist()


def takes_tools(name: str) -> bool:
    return name in ("chatml", "llama3")


@pytest.mark.parametrize("name", BUILT_IN)
@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_built_in_text_and_tokens_are_those_of_the_published_template(name, messages, folder, reference):
    if messages[-1]["role"] == "user" and not takes_tools(name):
        assert isinstance(encode(folder, messages, chat=name), Refused)
        return
    text, _ = open_chat_template(name, folder).render(messages)
    assert text == reference.apply_chat_template(messages, chat_template=PUBLISHED[name], tokenize=False)
    expected = reference.apply_chat_template(messages, chat_template=PUBLISHED[name], return_dict=False)
    assert encode(folder, messages, chat=name).tokens.tolist() == expected


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_spans_hold_what_the_assistant_says(name, folder):
    text, spans = open_chat_template(name, folder).render(CONVERSATIONS[1])
    end = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>"}.get(name, "</s>")
    answers = ["日本 🦓", "\n  def f():\n    return 'größe'\n"]
    if name in ("llama2", "llama3"):
        answers = [answer.strip() for answer in answers]
    if name == "llama2":
        answers = [f" {answer} " for answer in answers]
    assert [text[slice(*span)] for span in spans] == [answer + end for answer in answers]


@pytest.mark.parametrize("name", MARKED)
@pytest.mark.parametrize("messages", CONVERSATIONS[::2])
def test_tokens_and_masks_are_those_of_transformers(name, messages, folder, reference, tmp_path):
    """A marked template: ours, and the built-in one, and the published one told apart by prefixes."""
    expected = reference.apply_chat_template(
        messages, chat_template=MARKED[name], return_dict=True, return_assistant_tokens_mask=True
    )
    assert 0 < sum(expected["assistant_masks"]) < len(expected["input_ids"])
    for file, source in (("marked.jinja", MARKED[name]), ("published.jinja", PUBLISHED[name])):
        (tmp_path / file).write_text(source)
    for chat in (name, str(tmp_path / "marked.jinja"), str(tmp_path / "published.jinja")):
        document = encode(folder, messages, chat=chat)
        assert document.tokens.tolist() == expected["input_ids"]
        assert mask(document) == expected["assistant_masks"]
        assert document.spans.dtype == np.int64


@pytest.mark.parametrize("name", BUILT_IN)
def test_prefixes_find_the_spans_of_the_built_in_templates(name, folder, tmp_path):
    """The published templates say nothing of who speaks; what an answer adds to its prompt is the assistant's."""
    (tmp_path / "published.jinja").write_text(PUBLISHED[name])
    template = open_chat_template(str(tmp_path / "published.jinja"), folder)
    if name == "alpaca":  # has no generation prompt: its header cannot be told from the answer
        text, spans = template.render(CONVERSATIONS[1])
        assert text[slice(*spans[0])].startswith("### Response:\n日本")
    else:
        assert template.render(CONVERSATIONS[1]) == open_chat_template(name, folder).render(CONVERSATIONS[1])


def test_token_belongs_to_the_answer_if_it_begins_there(folder, tokenizer):
    """The template's line end and the answer's first are one token, which no prompt would end with: it is left out."""
    document = encode(folder, conversation("user: a\nassistant: \\n\\nb"), chat="chatml")
    ((start, end),) = document.spans
    assert tokenizer.id_to_token(int(document.tokens[start - 1])) == "ĊĊ"
    assert tokenizer.decode(document.tokens[start:end].tolist(), skip_special_tokens=False) == "\nb<|im_end|>"


@pytest.mark.parametrize("place", ["chat_template.jinja", "tokenizer_config.json", "named"])
def test_the_tokenizers_own_template(place, folder):
    with pytest.raises(CorpusError, match="brings no chat template"):
        encode(folder, CONVERSATIONS[0], chat="tokenizer")
    if place == "chat_template.jinja":
        (folder / place).write_text(CHATML)
    else:
        named = [{"name": "tool_use", "template": "?"}, {"name": "default", "template": CHATML}]
        (folder / "tokenizer_config.json").write_text(
            json.dumps({"chat_template": CHATML if place != "named" else named})
        )
    ours, built_in = (encode(folder, CONVERSATIONS[0], chat=chat) for chat in ("tokenizer", "chatml"))
    assert ours.tokens.tolist() == built_in.tokens.tolist()
    assert ours.spans.tolist() == built_in.spans.tolist()


def test_template_that_rewrites_earlier_turns_is_refused(folder, tmp_path):
    (tmp_path / "t.jinja").write_text(CHATML.replace("{% for", "{{ messages | length }}{% for"))
    with pytest.raises(CorpusError, match=r"put \{% generation %\} blocks into it, or name a built-in"):
        encode(folder, CONVERSATIONS[1], chat=str(tmp_path / "t.jinja"))


def test_unusable_templates_are_named(folder, tmp_path):
    (tmp_path / "bad.jinja").write_text("{% for %}")
    with pytest.raises(CorpusError, match="is no Jinja template"):
        encode(folder, CONVERSATIONS[0], chat=str(tmp_path / "bad.jinja"))
    with pytest.raises(
        CorpusError, match=r"no chat template 'vicuna'; give one of chatml, llama3, .* or a \.jinja file"
    ):
        encode(folder, CONVERSATIONS[0], chat="vicuna")
    with pytest.raises(CorpusError, match=r"'nowhere\.jinja' cannot be read"):
        encode(folder, CONVERSATIONS[0], chat="nowhere.jinja")
    (folder / "tokenizer_config.json").unlink()
    (tmp_path / "llama.jinja").write_text(LLAMA2)
    with pytest.raises(CorpusError, match=r"prints bos_token and eos_token, which tokenizer_config\.json would name"):
        encode(folder, CONVERSATIONS[0], chat=str(tmp_path / "llama.jinja"))


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{{ ''['__class__'] }}{{ cycler.__init__.__globals__.os.mkdir(PLACE) }}",
        "{{ messages[0].__init__.__globals__['__builtins__']['open'](PLACE, 'w') }}",
        "{{ (messages | attr('__class__')).mro() }}",
        "{% include '/etc/passwd' %}",
        "{% do messages.append(1) %}{{ messages.append(1) }}",
        "{{ 1 // 0 }}",
        "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
        "{% for a in range(10 ** 9) %}{% endfor %}",
    ],
)
def test_templates_reach_nothing_but_their_messages(source, folder, tmp_path):
    place = tmp_path / "made by the template"
    (tmp_path / "t.jinja").write_text(
        "{% generation %}" + source.replace("PLACE", repr(str(place))) + "{% endgeneration %}"
    )
    try:
        refused = encode(folder, CONVERSATIONS[0], chat=str(tmp_path / "t.jinja"))
    except CorpusError as error:
        assert "no Jinja template" in str(error)  # noqa: PT017
    else:
        assert isinstance(refused, Refused)
        assert refused.reason == "is rejected by the chat template"
    assert not place.exists()


def test_roles_out_of_turn_are_refused_by_both_kinds(folder, tmp_path):
    (tmp_path / "llama.jinja").write_text(LLAMA2)
    messages = conversation("user: a\nuser: b\nassistant: c")
    assert encode(folder, messages, chat="llama2").reason.startswith("has user and assistant not take turns")
    assert encode(folder, messages, chat=str(tmp_path / "llama.jinja")) == Refused(
        "is rejected by the chat template", "Conversation roles must alternate user/assistant/user/assistant/..."
    )
    with pytest.raises(ConversationError, match="has a tool message, which the zephyr template cannot print"):
        open_chat_template("zephyr", folder).render(CONVERSATIONS[2])


def test_template_that_fails_on_a_conversation_refuses_it(folder, tmp_path):
    (tmp_path / "sums.jinja").write_text("{% for m in messages %}{{ m.content + m.role|length }}{% endfor %}")
    refused = encode(folder, CONVERSATIONS[0], chat=str(tmp_path / "sums.jinja"))
    assert refused.reason == "is rejected by the chat template"
    assert "str" in refused.details


def test_alpaca_ends_with_the_tokenizers_end(tokenizer, tmp_path):
    save_tokenizer(tokenizer, tmp_path / "tokenizer.json")
    assert encode(tmp_path, CONVERSATIONS[0], chat="alpaca").tokens[-1] == tokenizer.token_to_id(EOD_TOKEN)
