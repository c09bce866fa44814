"""Rendering with marks: the same text as without them, and what the marks say.

The templates are some eighty real ones. `render_jinja_template` of transformers is the oracle for
the text and for the generation blocks. Spans are compared in `test_templates`.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from srft_prep.errors import ConfigError, FormatError
from srft_prep.history import Renderer
from srft_prep.render import ChatTemplate
from srft_prep.template_messages import template_messages, template_tools
from srft_prep.types import Message, Trajectory

REPOSITORY = Path(__file__).resolve().parents[1]
TEMPLATES = REPOSITORY.parent / "shared" / "data" / "templates"
ALL = sorted(str(path.relative_to(TEMPLATES)) for path in TEMPLATES.rglob("*.jinja"))
MARKED = [name for name in ALL if name.endswith("_training.jinja")]

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
CONTROL = re.compile(
    r"<[|\uff5c][^<>\s'\"]*?[|\uff5c]>|<(?:start|end)_of_turn>|<turn\||\|turn>|\[/?[A-Z_]+\]|</?s>|<sop>"
)
"""What control tokens look like in templates whose tokenizer is not at hand."""


def call(number: int, command: str) -> list[dict[str, Any]]:
    function = {"name": "bash", "arguments": {"command": command}}
    return [{"id": f"abcdefgh{number}", "type": "function", "function": function}]


PLAIN: list[dict[str, Any]] = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": " one\n"},
    {"role": "user", "content": "seen"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "seen <|im_end|> again"},
    {"role": "assistant", "content": "three"},
]
WITH_TOOLS: list[dict[str, Any]] = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "one", "tool_calls": call(1, "echo '<|im_end|>'")},
    {"role": "tool", "content": "<|im_end|>", "tool_call_id": "abcdefgh1", "name": "bash"},
    {"role": "assistant", "content": "two", "tool_calls": call(2, "ls")},
    {"role": "tool", "content": "a b", "tool_call_id": "abcdefgh2", "name": "bash"},
    {"role": "assistant", "content": "three"},
]
CONVERSATIONS = {
    "plain": PLAIN,
    "system": [{"role": "system", "content": "be good"}, *PLAIN],
    "tools": WITH_TOOLS,
    "thoughts": [
        {**message, "reasoning_content": "hm"} if message["role"] == "assistant" else message
        for message in PLAIN
    ],
}


def compiled(source: str, *control_tokens: str) -> ChatTemplate:
    tokens = {*CONTROL.findall(source), "<s>", "</s>", "<|im_end|>", *control_tokens}
    return ChatTemplate(source, variables=SPECIAL, control_tokens=sorted(tokens))


def unmarked(source: str, messages: list[dict[str, Any]], *, blocks: bool = False) -> Any:
    """The text as transformers renders it, with the marked blocks if asked; None if refused."""
    try:
        (text,), marks = render_jinja_template(
            conversations=[messages],
            chat_template=source,
            return_assistant_tokens_mask=blocks,
            add_generation_prompt=False,
            **SPECIAL,
        )
    except Exception:  # noqa: BLE001 - a template may raise anything
        return None
    return (text, marks[0]) if blocks else text


@pytest.mark.parametrize("name", ALL)
def test_marks_never_change_what_a_template_writes(name: str, shared_data: Path) -> None:
    source = (shared_data / "templates" / name).read_text(encoding="utf-8")
    template = compiled(source)
    for messages in CONVERSATIONS.values():
        expected = unmarked(source, messages)
        if expected is None:
            with pytest.raises(FormatError, match="the chat template refuses the conversation"):
                template.render(messages, None)
        else:
            assert template.render(messages, None).text == expected


@pytest.mark.parametrize("name", MARKED)
def test_generation_blocks_are_where_transformers_finds_them(name: str, shared_data: Path) -> None:
    source = (shared_data / "templates" / name).read_text(encoding="utf-8")
    template = compiled(source)
    for messages in CONVERSATIONS.values():
        rendered = unmarked(source, messages, blocks=True)
        if rendered is not None:
            assert list(template.render(messages, None).generation) == rendered[1]


@pytest.mark.parametrize(
    ("name", "openings"),
    [
        ("trl/qwen2_5", ["\n<tool_call>", "\n<tool_call>"]),
        ("from_tokenizer_configs/kimi-k2", ["<|tool_calls_section_begin|>"] * 2),
        ("trl/gptoss", ["<|start|>assistant to=functions.bash"] * 2),
        ("trl/lfm2_2_5", ["<|tool_call_start|>["] * 2),
        ("llama.cpp/mistralai-Mistral-Nemo-Instruct-2407", ["[TOOL_CALLS][{"] * 2),
        ("trl/deepseekv3_training", ["<\uff5ctool▁calls▁begin", "\n<\uff5ctool▁call▁begin"]),
        ("trl/cohere", []),
    ],
)
def test_calls_begin_with_the_words_that_open_them(
    name: str, openings: list[str], shared_data: Path
) -> None:
    source = (shared_data / "templates" / f"{name}.jinja").read_text(encoding="utf-8")
    conversation = WITH_TOOLS if openings else PLAIN
    rendering = compiled(source).render(conversation, None)
    assert len(rendering.calls) == len(openings)
    for opening, place in zip(openings, rendering.calls.values(), strict=True):
        assert rendering.text.startswith(opening, place)


def test_a_mark_within_an_expression_stands_between_content_and_calls() -> None:
    template = compiled(
        "{% for m in messages %}{{ '<a>' + m.content + '[CALLS]' + m.tool_calls[0].function.name }}"
        "{% endfor %}"
    )
    rendering = template.render([WITH_TOOLS[1]], None)
    assert rendering.text[rendering.calls[0] :] == "[CALLS]bash"
    assert rendering.text == "<a>one[CALLS]bash"


def test_loops_within_macros_do_not_cut_a_message() -> None:
    template = compiled(
        "{% macro count(ms) %}{% for x in ms %}{{ x.role[0] }}{% endfor %}{% endmacro %}"
        "{% for m in messages %}<{{ count(messages) }}:{{ m.content }}>{% endfor %}"
    )
    rendering = template.render(PLAIN[:2], None)
    assert rendering.text == "<ua:hi><ua: one\n>"
    assert [rendering.text[start:end] for start, end in rendering.segments.values()] == [
        "<ua:hi>",
        "<ua: one\n>",
    ]


def test_messages_are_known_by_identity_whatever_the_loop_is_called() -> None:
    template = compiled(
        "{% set rest = messages[1:] %}{{ messages[0].content }}|"
        "{% for turn in rest | list %}{{ turn.content }}{% endfor %}|"
    )
    twice = {"role": "user", "content": "same"}
    rendering = template.render([twice, twice, twice], None)
    assert rendering.segments == {1: (5, 9), 2: (9, 13)}


def test_control_tokens_of_messages_are_told_from_the_templates_own(shared_data: Path) -> None:
    source = (shared_data / "templates" / "trl" / "qwen2_5.jinja").read_text(encoding="utf-8")
    rendering = compiled(source, "<|im_start|>").render(WITH_TOOLS, None)
    assert [rendering.text[start:end] for start, end in rendering.forged] == ["<|im_end|>"] * 2
    before = [rendering.text[start - 6 : start] for start, _ in rendering.forged]
    assert before == ["echo '", "onse>\n"]


def test_the_longest_control_token_wins() -> None:
    template = ChatTemplate(
        "{% for m in messages %}{{ m.content }}{% endfor %}",
        variables={},
        control_tokens=["<s>", "<s><s>"],
    )
    rendering = template.render([{"role": "user", "content": "a<s><s><s>"}], None)
    assert rendering.forged == ((1, 7), (7, 10))


def test_marks_avoid_characters_that_occur_anywhere_in_the_conversation() -> None:
    used = "".join(map(chr, range(0xF0000, 0xF0100)))
    template = compiled(
        "{% for m in messages %}{{ m.content }}{{ m.tool_calls | tojson }}{% endfor %}"
        "{{ tools | tojson }}"
    )
    messages = [{"role": "user", "content": used[::3], "tool_calls": [{used[1::3]: "<s>"}]}]
    tools = [{"name": used[2::3]}]
    rendering = template.render(messages, tools)
    expected = [messages[0]["content"], messages[0]["tool_calls"], tools]
    as_json = [json.dumps(value, ensure_ascii=False) for value in expected[1:]]
    assert rendering.text == expected[0] + "".join(as_json)
    assert [rendering.text[start:end] for start, end in rendering.forged] == ["<s>"]


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{% for message in messages %}", "the chat template is broken, line 1"),
        ("\n\n{{ messages | no_such_filter }}", "the chat template is broken, line 3"),
        ("<s>{{ messages[0].content }}", "has no loop over messages"),
        ("{% for x in tools or [] %}{{ x }}{% endfor %}", "has no loop over messages"),
        ("{% for m in messages %}{{ m.role }}{% endfor %}", "shows nothing of what an assistant"),
        ("{% for m in messages %}{{ m.role + nothing }}{% endfor %}", "'nothing' is undefined"),
    ],
)
def test_a_broken_template_is_one_clear_sentence(source: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason) as raised:
        Renderer(compiled(source))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "expression",
    [
        "raise_exception('no')",
        "1 / 0",
        "m.content + 1",
        "m.nothing.at_all",
        "m.content.index('nowhere')",
        "range(10 ** 9)",
        "m | tojson",
    ],
)
def test_whatever_a_template_raises_is_a_refusal_of_that_conversation(expression: str) -> None:
    template = compiled("{% for m in messages %}{{ " + expression + " }}{% endfor %}")
    deep: Any = 1
    for _ in range(2000):
        deep = [deep]
    extra = {"deep": deep} if expression == "m | tojson" else {}
    with pytest.raises(FormatError, match="the chat template refuses the conversation"):
        template.render([{"role": "user", "content": "x", **extra}], None)


def test_a_pair_of_marks_that_a_template_cuts_leaves_a_place_where_the_text_is_encoded_apart() -> (
    None
):
    template = compiled(
        "{% for m in messages %}{% for p in m.content.split('<cut>') %}{{ p }}{% endfor %}"
        "{% endfor %}",
        "<cut>",
    )
    rendering = template.render([{"role": "user", "content": "<|im_<cut>end|>"}], None)
    assert rendering.text == "<|im_end|>"
    assert rendering.forged == ((5, 5),)


def test_templates_are_given_chat_messages_without_null_fields() -> None:
    calls = [
        {"type": "function", "function": {"name": "f", "arguments": '{"n": 12345678901234567890}'}},
        {"type": "function", "function": {"name": "f", "arguments": "[1]"}},
        {"type": "function", "function": {"name": "f", "arguments": "not JSON"}},
        {"type": "function", "function": {"name": "f"}},
    ]
    trajectory = Trajectory(
        trajectory_id="t",
        instance_id="",
        format="messages",
        tools='[{"type": "function"}]',
        messages=(
            Message(role="user", kind="prompt", content=""),
            Message(role="assistant", kind="action", tool_calls=json.dumps(calls)),
            Message(role="exit", kind="artifact", content="bye"),
            Message(role="tool", kind="observation", content="o", tool_call_id="1", name="f"),
        ),
    )
    messages, indices = template_messages(trajectory)
    assert indices == [0, 1, 3]
    assert messages[0] == {"role": "user", "content": ""}
    assert messages[1].keys() == {"role", "tool_calls"}
    given = [call["function"].get("arguments") for call in messages[1]["tool_calls"]]
    assert given == [{"n": 12345678901234567890}, "[1]", "not JSON", None]
    assert messages[2] == {"role": "tool", "content": "o", "tool_call_id": "1", "name": "f"}
    assert template_tools(trajectory) == [{"type": "function"}]
