"""Rendering with marks: the same text as without them, and spans where the markers say.

The templates are some eighty real ones. `render_jinja_template` of transformers is the oracle for
the text; the generation markers of TRL's training templates are the oracle for the spans.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from srft_prep.errors import ConfigError, FormatError
from srft_prep.render import ChatTemplate, action_span, template_messages, template_tools
from srft_prep.types import Message, Trajectory

REPOSITORY = Path(__file__).resolve().parents[1]
TEMPLATES = REPOSITORY.parent / "shared" / "data" / "templates"
ALL = sorted(str(path.relative_to(TEMPLATES)) for path in TEMPLATES.rglob("*.jinja"))
MARKED = [name for name in ALL if name.endswith("_training.jinja")]

AGREE = {
    f"trl/{name}_training.jinja"
    for name in (
        *("cohere", "cohere2", "gemma", "gemma3", "glm4moe", "gptoss", "lfm2", "llama3"),
        *("qwen2_5", "qwen2_5_vl", "qwen3", "qwen3_5_nothink", "qwen3_5_think", "qwen3_6"),
        *("qwen3_instruct_2507", "qwen3_vl"),
    )
}
"""Templates that must give spans; the others may refuse, with a reason, but give no wrong one."""

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


def joined(blocks: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Marked blocks, neighbours as one: gpt-oss marks a thought and the answer apart."""
    starts = {start for start, _ in blocks}
    ends = {end for _, end in blocks}
    return list(zip(sorted(starts - ends), sorted(ends - starts), strict=True))


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
def test_spans_agree_with_generation_markers_or_are_refused(name: str, shared_data: Path) -> None:
    """A marked block is our span, with what the generation prompt forces and what follows the end.

    Some markers take in the end of the header (`<think>\\n` in Qwen3.5, all of it in gpt-oss), and
    many the newline behind the end of turn; the agent wrote neither.
    """
    source = (shared_data / "templates" / name).read_text(encoding="utf-8")
    template = compiled(source)
    num_agreed = 0
    for messages in CONVERSATIONS.values():
        rendered = unmarked(source, messages, blocks=True)
        if rendered is None:
            continue
        text, blocks = rendered
        try:
            header = template.generation_prompt(PLAIN[:1])
            rendering = template.render(messages, None)
            spans = [
                action_span(rendering, index, header=header, end=template.control_tokens)
                for index, message in enumerate(messages)
                if message["role"] == "assistant"
            ]
        except (ConfigError, FormatError):
            continue
        for (start, end), (begin, stop) in zip(spans, joined(blocks), strict=True):
            assert header.endswith(text[begin:start])
            assert text[end:stop].strip() == ""
            assert begin <= start < end <= stop
            num_agreed += 1
    assert num_agreed >= 6 or name not in AGREE


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
        ("{% for x in tools %}{{ x }}{% endfor %}", "has no loop over messages"),
    ],
)
def test_a_broken_template_is_one_clear_sentence(source: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason) as raised:
        compiled(source)
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


@pytest.mark.parametrize(
    "source",
    [
        "{% for m in messages %}{{ m.content }}{% endfor %}",
        "{% for m in messages %}{{ m.content }}{% endfor %}{{ 'x' if not add_generation_prompt }}",
    ],
)
def test_a_template_without_a_generation_prompt_cannot_be_used(source: str) -> None:
    with pytest.raises(ConfigError, match="writes no generation prompt"):
        compiled(source).generation_prompt([{"role": "user", "content": "-"}])


def test_an_assistant_turn_without_header_or_end_has_no_span() -> None:
    source = (
        "{% for m in messages %}{{ m.role if loop.first else '<a>' }}{{ m.content }}{% endfor %}"
        "{{ '<a>' if add_generation_prompt }}"
    )
    template = compiled(source, "<e>")
    turns = [{"role": "assistant", "content": "<e>"} for _ in range(2)]
    rendering = template.render(turns, None)
    with pytest.raises(FormatError, match="does not start with its generation prompt '<a>'"):
        action_span(rendering, 0, header="<a>", end=template.control_tokens)
    with pytest.raises(FormatError, match="message 1: the chat template writes no end of turn"):
        action_span(rendering, 1, header="<a>", end=template.control_tokens)
    with pytest.raises(FormatError, match="does not start with"):
        action_span(rendering, 2, header="<a>", end=template.control_tokens)


def test_a_control_token_that_the_agent_printed_ends_no_turn() -> None:
    template = compiled("{% for m in messages %}<a>{{ m.content }}{% endfor %}", "<a>", "<e>")
    rendering = template.render([{"role": "assistant", "content": "hello <e>"}], None)
    with pytest.raises(FormatError, match="writes no end of turn"):
        action_span(rendering, 0, header="<a>", end=template.control_tokens)


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
