"""Spans, parts and fields of steps, and what a template does to the past, template by template."""

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from srft_prep.conversations import Conversation
from srft_prep.errors import FormatError
from srft_prep.findings import describe_findings
from srft_prep.history import Renderer
from srft_prep.render import ChatTemplate
from srft_prep.types import Message, Trajectory
from tests import template_oracle as oracle

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
THINK = re.compile(r"</?think>")


@cache
def renderer(name: str) -> Renderer:
    source = oracle.source_of(f"{name}.jinja")
    control = {*oracle.LOOKALIKE.findall(source), *SPECIAL.values()}
    control.update(oracle.family_of(f"{name}.jinja").ends)
    return Renderer(ChatTemplate(source, variables=SPECIAL, control_tokens=sorted(control)))


def trajectory_of(*messages: Message, tools: str | None = None) -> Trajectory:
    return Trajectory(
        trajectory_id="t", instance_id="", format="messages", messages=messages, tools=tools
    )


def prompt(content: str = "go") -> Message:
    return Message(role="user", kind="prompt", content=content)


def seen(content: str = "seen", role: str = "user") -> Message:
    return Message(role=role, kind="observation", content=content)


def action(content: str | None = None, **fields: Any) -> Message:
    return Message(role="assistant", kind="action", content=content, **fields)


def calls(*names: str) -> str:
    return json.dumps(
        [
            {"type": "function", "function": {"name": name, "arguments": '{"a": "x"}'}}
            for name in names
        ]
    )


def written(conversation: Conversation) -> list[str]:
    return [conversation.rendering.text[start:end] for _, start, end in conversation.spans]


def parts(conversation: Conversation) -> list[tuple[int, str, str]]:
    text = conversation.rendering.text
    return [(step, part, text[start:end]) for step, part, start, end in conversation.parts]


def fields(conversation: Conversation) -> list[tuple[int, str, str, int]]:
    texts = dict(
        zip((step for step, _, _ in conversation.spans), written(conversation), strict=True)
    )
    return [
        (step, name, texts[step][start:end], skipped)
        for step, name, start, end, skipped in conversation.fields
    ]


def full(name: str, *messages: Message, tools: str | None = None) -> Conversation:
    (whole,) = renderer(name).conversations(trajectory_of(*messages, tools=tools), history="full")
    return whole


# Headers and ends ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("trl/qwen2_5", "say<|im_end|>"),
        ("trl/gemma", "say<end_of_turn>"),
        ("llama.cpp/mistralai-Mistral-Nemo-Instruct-2407", "say</s>"),
        ("trl/cohere2", "say<|END_RESPONSE|><|END_OF_TURN_TOKEN|>"),
        ("trl/gptoss", "<|channel|>final<|message|>say<|return|>"),
        ("trl/qwen3_5_think", "\n</think>\n\nsay<|im_end|>"),
        ("trl/nemotron_3_nano", "<think></think>say<|im_end|>"),
        ("llama.cpp/deepseek-ai-DeepSeek-R1-Distill-Qwen-32B", "say<\uff5cend▁of▁sentence\uff5c>"),
        ("trl/idefics3", " say<end_of_utterance>"),
        ("from_tokenizer_configs/nvidia-mistral", "say"),
    ],
)
def test_a_span_is_what_the_agent_wrote_behind_what_it_was_given(name: str, expected: str) -> None:
    assert written(full(name, prompt(), action("say"))) == [expected]


def test_the_token_that_opens_the_next_turn_ends_one_that_has_no_end() -> None:
    whole = full("trl/glm4moe", prompt(), action("a"), seen("b"), action("c"))
    assert written(whole) == ["\n<think></think>\na<|user|>", "\n<think></think>\nc"]
    found = renderer("trl/glm4moe").findings(
        trajectory_of(prompt(), action("a"), seen("b"), action("c")), [whole]
    )
    assert found == {"no_end_of_turn": 1}


def test_a_message_that_goes_on_like_the_dropped_prompt_makes_no_longer_header() -> None:
    whole = full("QwenLM/qwen3_nonthinking", prompt(), action("<think"), seen(), action("b"))
    assert written(whole)[0] == "<think<|im_end|>"


def test_an_end_of_turn_that_the_agent_printed_is_none() -> None:
    whole = full("from_tokenizer_configs/nvidia-mistral", prompt(), action("say</s>"), seen())
    assert parts(whole) == [(0, "thought", "say</s>")]


def test_a_turn_that_holds_what_the_tool_answered_has_no_span() -> None:
    messages = [prompt(), action("a", tool_calls=calls("f")), seen("out", "tool")]
    with pytest.raises(FormatError, match="message 1: the chat template writes what the tool"):
        full("trl/diffusion_gemma", *messages)
    assert written(full("trl/diffusion_gemma", prompt(), action("a"))) == ["a<turn|>"]


# Parts and fields ---------------------------------------------------------------------------------


def test_parts_and_fields_of_a_step_with_everything() -> None:
    thinking = action(" act\n", reasoning_content="\nhm ", tool_calls=calls("f", "g"))
    whole = full("trl/qwen3", prompt(), thinking)
    call = '<tool_call>\n{{"name": "{}", "arguments": {{"a": "x"}}}}\n</tool_call>'
    assert parts(whole) == [
        (0, "thought", "<think>\nhm \n</think>\n\n act\n"),
        (0, "tool_call", "\n" + call.format("f") + "\n" + call.format("g")),
        (0, "end_of_turn", "<|im_end|>"),
    ]
    assert fields(whole) == [
        (0, "reasoning_content", "hm ", 1),
        (0, "content", " act\n", 0),
    ]


def test_fields_in_the_channels_of_gpt_oss() -> None:
    thinking = action("answer", reasoning_content="hm")
    whole = full("trl/gptoss", prompt(), action("why", tool_calls=calls("f")), thinking)
    assert parts(whole)[0] == (
        *(0, "tool_call"),
        ' to=functions.f<|channel|>commentary json<|message|>{"a": "x"}',
    )
    assert fields(whole)[-2:] == [
        (1, "reasoning_content", "hm", 0),
        (1, "content", "answer", 0),
    ]


def test_a_field_that_the_template_changes_has_no_place_and_is_counted() -> None:
    messages = [prompt(), action("<think>\nhm\n</think>\n\nsaid"), seen(), action("b")]
    whole = full("trl/qwen3", *messages)
    assert fields(whole) == [(1, "content", "b", 0)]
    found = renderer("trl/qwen3").findings(trajectory_of(*messages), [whole])
    assert found == {"dropped_content": 1}
    assert describe_findings(found, num_steps=2) == [
        "1 of 2 steps lost their content: the chat template leaves it out"
    ]


def test_what_llama_drops_beside_a_call_is_counted() -> None:
    messages = [prompt(), action("why", tool_calls=calls("f")), seen("out", "tool")]
    whole = full("trl/llama3_1", *messages)
    found = renderer("trl/llama3_1").findings(trajectory_of(*messages), [whole])
    assert found == {"dropped_content": 1}
    assert [part for _, part, _ in parts(whole)] == ["tool_call", "end_of_turn"]


def test_answers_of_tools_that_a_template_leaves_out_are_counted() -> None:
    messages = [prompt(), action("a", tool_calls=calls("f")), seen("1", "tool"), seen("2", "tool")]
    whole = full("trl/phi3", *messages)
    found = renderer("trl/phi3").findings(trajectory_of(*messages), [whole])
    assert found == {"dropped_answers": 2, "dropped_tool_calls": 1}


TEXT = st.text(st.sampled_from("ab<|>/ \n\t\u3000{}[]é"), max_size=12)
PLACED = (
    *("trl/qwen2_5", "trl/qwen3", "trl/qwen3_5_think", "trl/gptoss", "trl/glm4moe"),
    *("trl/nemotron_3_nano", "from_tokenizer_configs/kimi-k2", "trl/lfm2_2_5", "trl/gemma3"),
    *("llama.cpp/mistralai-Mistral-Nemo-Instruct-2407", "trl/llama3_1", "trl/deepseekv3"),
)


@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow])
@given(
    name=st.sampled_from(PLACED),
    contents=st.lists(TEXT, min_size=1, max_size=4),
    thoughts=st.none() | TEXT,
    calling=st.booleans(),
)
def test_parts_cover_spans_and_fields_are_the_messages_own_words(
    name: str, contents: list[str], thoughts: str | None, calling: bool
) -> None:
    messages = [prompt()]
    for content in contents:
        called = calls("bash") if calling and "Mistral" not in name else None
        messages.append(action(content, reasoning_content=thoughts, tool_calls=called))
        messages.append(seen("out", "tool" if called else "user"))
    trajectory = trajectory_of(*messages)
    try:
        (whole,) = renderer(name).conversations(trajectory, history="full")
    except FormatError:
        return
    for step, start, end in whole.spans:
        edges = [edge for which, _, *two in whole.parts if which == step for edge in two]
        assert (edges[0], edges[-1]) == (start, end)
        assert edges[1:-1:2] == edges[2:-1:2]
    for step, field, text, skipped in fields(whole):
        said = getattr(trajectory.steps[step].action, field)
        assert said[skipped:].startswith(text)
        assert not said[:skipped].strip()
        assert not said[skipped + len(text) :].strip()


# History ------------------------------------------------------------------------------------------


def talk(num_steps: int, role: str = "user", thoughts: bool = True) -> list[Message]:
    messages = [prompt()]
    for step in range(num_steps):
        reasoning = f"think {step}" if thoughts else None
        messages += [action(f"act {step}", reasoning_content=reasoning), seen(f"out {step}", role)]
    return messages


@pytest.mark.parametrize(
    ("name", "messages", "groups"),
    [
        ("trl/qwen3", talk(4), [[0], [1], [2], [3]]),
        ("trl/qwen3", talk(4, "tool"), [[0, 1, 2, 3]]),
        ("trl/qwen3", [*talk(2, "tool"), *talk(2, "tool")], [[0, 1], [2, 3]]),
        ("trl/qwen3", talk(3, thoughts=False), [[0], [1], [2]]),
        ("trl/qwen2_5", talk(3), [[0, 1, 2]]),
        ("trl/glm4moe", talk(3, thoughts=False), [[0, 1, 2]]),
        ("llama.cpp/CohereForAI-c4ai-command-r-plus-tool_use", talk(3), [[0], [1], [2]]),
    ],
)
def test_per_step_joins_what_the_model_saw_as_one_context(
    name: str, messages: list[Message], groups: list[list[int]]
) -> None:
    trajectory = trajectory_of(*messages, tools=json.dumps(oracle.TOOLS))
    conversations = renderer(name).conversations(trajectory, history="per-step")
    assert [[step for step, _, _ in each.spans] for each in conversations] == groups
    if len(groups) == 1:
        assert conversations == renderer(name).conversations(trajectory, history="full")


def test_a_turn_stands_behind_all_that_the_model_saw_even_if_the_template_drops_some_of_it() -> (
    None
):
    name = "llama.cpp/deepseek-ai-DeepSeek-R1-Distill-Qwen-32B"
    trajectory = trajectory_of(*talk(2, thoughts=False))
    first, second = renderer(name).conversations(trajectory, history="per-step")
    head, end = "<s><\uff5cUser\uff5c>go", "<\uff5cend▁of▁sentence\uff5c>"
    asked = "<\uff5cAssistant\uff5c>"
    assert first.rendering.text == f"{head}{asked}<think>\nact 0{end}"
    between = f"{asked}act 0{end}<\uff5cUser\uff5c>out 0"
    assert second.rendering.text == f"{head}{between}{asked}<think>\nact 1{end}"
    assert written(second) == [f"act 1{end}"]
    assert parts(second) == [(1, "thought", "act 1"), (1, "end_of_turn", end)]
    assert fields(second) == [(1, "content", "act 1", 0)]


def test_the_cost_of_per_step_is_known_before() -> None:
    trajectories = [trajectory_of(*talk(4)), trajectory_of(*talk(4, "tool"))]
    cost = renderer("trl/qwen3").cost(trajectories)
    assert (cost.full_sequences, cost.per_step_sequences) == (2, 5)
    assert cost.factor == cost.per_step_characters / cost.full_characters > 1
    assert renderer("trl/qwen2_5").cost(trajectories).factor == 1


def test_generation_blocks_belong_to_their_steps() -> None:
    demo = Message(role="assistant", kind="demo", content="shown")
    whole = full("trl/qwen3_training", prompt(), demo, prompt("now"), action("a"), seen())
    text = whole.rendering.text
    blocks = [each for each in whole.conventions if each[0] == "trl"]
    assert [(step, text[start:end]) for _, step, start, end in blocks] == [
        (-1, "<think>\n\n</think>\n\nshown<|im_end|>\n"),
        (0, "<think>\n\n</think>\n\na<|im_end|>\n"),
    ]


@pytest.mark.parametrize("name", ["trl/qwen3", "trl/qwen2_5", "trl/gptoss"])
def test_no_step_is_trained_twice_or_left_out(name: str, shared_data: Path) -> None:
    assert shared_data == oracle.DATA
    for row in oracle.synthetic_rows():
        messages = tuple(Message(**each) for each in row["messages"])
        trajectory = trajectory_of(*messages, tools=row["tools"])
        try:
            conversations = renderer(name).conversations(trajectory, history="per-step")
        except FormatError:
            continue
        steps = [step for each in conversations for step, _, _ in each.spans]
        assert steps == list(range(trajectory.num_steps))
