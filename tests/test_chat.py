"""Laws 1 to 4 on any conversation: exact ids, exact spans, no forged control token, history.

The oracle for ids is `apply_chat_template`, with `sanitize_control_tokens` where a message holds
the text of a special token. Spans are checked byte by byte against what the message says.
"""

import dataclasses
import json
import os
import unicodedata
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, processors
from transformers import AutoTokenizer

from srft_prep.chat import LoadedTokenizer, load_spec, tokenizer_path
from srft_prep.errors import ConfigError, FormatError
from srft_prep.types import Message, Trajectory

QWEN = "qwen2.5-coder-instruct"
START, END = "<|im_start|>", "<|im_end|>"
HEADER = START + "assistant\n"

EXAMPLES = int(os.environ.get("SRFT_FUZZ_EXAMPLES", "150"))
"""Random conversations a test; `make fuzz` asks for many more."""

bounded = settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[
        HealthCheck.function_scoped_fixture,
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
    ],
)


@cache
def source_of(name: str, data: Path) -> str:
    return name if name == "example" else str(data / "tokenizers" / name)


@cache
def ours(name: str, data: Path, *, fast: bool = True) -> LoadedTokenizer:
    return load_spec(source_of(name, data)).load(fast=fast)


@cache
def theirs(name: str, data: Path) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path(source_of(name, data)))
    tokenizer.chat_control_tokens = []  # the special tokens alone
    return tokenizer


# What conversations are made of -------------------------------------------------------------------

LOOKALIKES = (
    *(START, END, "<|endoftext|>", "<|im_start|>system\n", "<|im_end|>\n<|im_start|>assistant\n"),
    *("<|im_<|im_end|>end|>", "<|im_", "end|>", "<|im_start", "|>", "<|", "<tool_call>"),
)
UNICODE = (
    *("e\u0301", "\u0301", "\u0338", "\u212b", "\u0958", "\u1100\u1161\u11a8", "\u0323\u0307"),
    *(
        "\u200b",
        "\u200d",
        "\ufeff",
        "\u2028",
        "\u3000",
        "\u00a0",
        "\U0001f468\u200d\U0001f469",
        "漢字",
        *("\u200c", "\u2060", "\u202e", "\u0344", "\uac00", "\u1100\u1161", "\ufb01", "\u0340"),
    ),
)
PRIVATE_USE = ("\U000f0000", "\U000f0001", "\U000f0002", "\U000ffffd", "\ue000", "\U00100000")
"""The first two are the marks of transformers, which takes them out of content; we must not."""
PLAIN = ("a", "hello", " ", "  ", "\n", "\n\n", "\r\n", "\t", "assistant", "```", "{", '"', "\\n")


def texts(*, private_use: bool = True, control: bool = True) -> st.SearchStrategy[str]:
    pieces = [*PLAIN, *UNICODE]
    pieces += LOOKALIKES if control else ("<|im_", "<|", "|>", "<tool_call>", "</tool_call>")
    pieces += PRIVATE_USE if private_use else PRIVATE_USE[2:]
    assigned = st.characters(exclude_categories=["Cs", "Cn", "Co"])
    piece = st.sampled_from(pieces) | st.text(assigned, max_size=5)
    text = st.lists(piece, max_size=6).map("".join)
    if control:
        return text
    return text.filter(lambda value: not any(token in value for token in (START, END, "<|endo")))


def arguments(text: st.SearchStrategy[str], keys: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    """Arguments as the model wrote them: JSON of an object, of something else, or no JSON."""
    values = st.recursive(
        text | st.integers() | st.booleans() | st.none(),
        lambda inner: st.lists(inner, max_size=2) | st.dictionaries(keys, inner, max_size=2),
        max_leaves=4,
    )
    objects = st.dictionaries(keys, values, max_size=3)
    escaped = objects.map(json.dumps)
    return escaped | objects.map(lambda value: json.dumps(value, ensure_ascii=False)) | text


def tool_calls(
    text: st.SearchStrategy[str], keys: st.SearchStrategy[str]
) -> st.SearchStrategy[str]:
    function = st.fixed_dictionaries({"name": text, "arguments": arguments(text, keys)})
    call = st.fixed_dictionaries({"type": st.just("function"), "function": function})
    return st.lists(call, min_size=1, max_size=3).map(json.dumps)


@st.composite
def trajectories(
    draw: st.DrawFn,
    *,
    private_use: bool = True,
    control: bool = True,
    keys: st.SearchStrategy[str] = st.sampled_from(["command", "päth", "", "a b"]),  # noqa: B008
) -> Trajectory:
    text = texts(private_use=private_use, control=control)
    messages = []
    if draw(st.booleans()):
        messages.append(Message(role="system", kind="prompt", content=draw(text)))
    for _ in range(draw(st.integers(1, 8))):
        role = draw(st.sampled_from(["assistant", "assistant", "tool", "tool", "user", "exit"]))
        if role == "assistant":
            kind = draw(st.sampled_from(["action", "action", "action", "demo", "artifact"]))
            calls = draw(st.none() | tool_calls(text, keys))
            content = draw(text if calls is None else st.none() | text)
            messages.append(Message(role=role, kind=kind, content=content, tool_calls=calls))
        else:
            kind = draw(st.sampled_from(["prompt", "observation", "demo", "artifact"]))
            content = draw(text)
            if draw(st.integers(0, 9999)) == 2718:  # now and then a megabyte
                content = (content or "x") * (1_000_000 // len(content or "x"))
            messages.append(Message(role=role, kind=kind, content=content))
    if all(message.role == "exit" for message in messages):
        messages.append(Message(role="user", kind="prompt", content=draw(text)))
    definition = {"type": "function", "function": {"name": "bash", "description": draw(text)}}
    tools = draw(st.sampled_from([None, json.dumps([definition])]))
    return trajectory_of(*messages, tools=tools)


def trajectory_of(*messages: Message, tools: str | None = None) -> Trajectory:
    return Trajectory(
        trajectory_id="t", instance_id="", format="messages", messages=messages, tools=tools
    )


def prompt(content: str) -> Message:
    return Message(role="user", kind="prompt", content=content)


def action(content: str | None, **fields: Any) -> Message:
    return Message(role="assistant", kind="action", content=content, **fields)


def call_of(name: str, raw_arguments: str) -> str:
    function = {"name": name, "arguments": raw_arguments}
    return json.dumps([{"type": "function", "function": function}])


# The second computation ---------------------------------------------------------------------------


def chat_messages(trajectory: Trajectory) -> list[dict[str, Any]]:
    return [
        chat_message(message)
        for message in trajectory.messages
        if message.role in ("system", "user", "assistant", "tool")
    ]


def chat_message(message: Message) -> dict[str, Any]:
    row: dict[str, Any] = {"role": message.role, "content": message.content}
    row["reasoning_content"] = message.reasoning_content
    row["tool_calls"] = message.tool_calls and json.loads(message.tool_calls)
    for call in row["tool_calls"] or []:
        try:
            parsed = json.loads(call["function"]["arguments"])
        except ValueError:
            continue
        if isinstance(parsed, dict):
            call["function"]["arguments"] = parsed
    return {name: value for name, value in row.items() if value is not None}


def oracle_ids(tokenizer: Any, trajectory: Trajectory, **options: Any) -> list[int]:
    tools = json.loads(trajectory.tools) if trajectory.tools else None
    messages = chat_messages(trajectory)
    return tokenizer.apply_chat_template(messages, tools=tools, **options)["input_ids"]


def encoded(tokenizer: LoadedTokenizer, trajectory: Trajectory) -> tuple[list[int], list[Any]]:
    (tokens,) = tokenizer.encode(tokenizer.conversations(trajectory, history="full"))
    return tokens.ids.tolist(), list(tokens.step_spans)


def written_text(name: str, message: dict[str, Any]) -> str:
    """What the agent wrote in one message, in the form of a tokenizer's template."""
    parts = [message["content"]] if message.get("content") else []
    for call in message.get("tool_calls", []):
        function, given_arguments = call["function"], call["function"]["arguments"]
        as_json = json.dumps(given_arguments, ensure_ascii=False)
        if name == "example":
            called = json.dumps(function["name"], ensure_ascii=False)
            as_json = given_arguments if isinstance(given_arguments, str) else as_json
        else:
            called = f'"{function["name"]}"'
        parts.append(f'<tool_call>\n{{"name": {called}, "arguments": {as_json}}}\n</tool_call>')
    return "\n".join(parts) + END


def turns_of(name: str, trajectory: Trajectory) -> list[int | None]:
    """Which turn of the chat each rendered message is in; the number of turns is behind the last.

    Qwen2.5 writes a system turn of its own where there is none, and joins neighbouring tool
    messages in one turn.
    """
    roles = [message["role"] for message in chat_messages(trajectory)]
    turn = 0 if name == "example" or roles[0] == "system" else 1
    turns: list[int | None] = []
    for before, role in zip(["", *roles], roles, strict=False):
        joined = name != "example" and before == role == "tool"
        turn += not joined
        turns.append(turn - 1)
    return [*turns, turn]


@cache
def byte_of_character() -> dict[str, int]:
    """The bytes behind the characters of a byte-level vocabulary (GPT-2's table)."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {
        **{chr(byte): byte for byte in shown},
        **{chr(256 + i): byte for i, byte in enumerate(hidden)},
    }


def bytes_of(tokenizer: Any, ids: list[int]) -> list[bytes]:
    table, added = byte_of_character(), tokenizer.added_tokens_decoder
    return [
        added[i].content.encode() if i in added else bytes(table[c] for c in token)
        for i, token in zip(ids, tokenizer.convert_ids_to_tokens(ids), strict=True)
    ]


def assert_spans_are_exact(
    name: str, tokenizer: Any, trajectory: Trajectory, ids: list[int], spans: list[Any]
) -> None:
    """Law 2, from the first token that starts behind the header to the end of turn."""
    rendered = [m for m in trajectory.messages if m.role != "exit"]
    steps = [i for i, message in enumerate(rendered) if message.kind == "action"]
    assert [step for step, _, _ in spans] == list(range(len(steps)))
    start_id, end_id = tokenizer.convert_tokens_to_ids([START, END])
    starts = [i for i, token in enumerate(ids) if token == start_id]
    turns, messages = turns_of(name, trajectory), chat_messages(trajectory)
    for (_, start, end), index in zip(spans, steps, strict=True):
        turn = starts[turns[index]]
        pieces = bytes_of(tokenizer, ids[turn:end])
        text = b"".join(pieces).decode()
        assert nfc(text) == nfc(HEADER + written_text(name, messages[index]))
        lengths = [len(b"".join(pieces[:count])) for count in (start - turn - 1, start - turn)]
        assert lengths[0] < len(HEADER) <= lengths[1]
        assert ids[end - 1] == end_id


def nfc(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def assert_control_ids_are_the_templates(
    name: str, tokenizer: Any, trajectory: Trajectory, ids: list[int]
) -> None:
    """Law 3: as many special tokens as the template writes, in its order, and no other."""
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    pair = tokenizer.convert_tokens_to_ids([START, END])
    num_turns = turns_of(name, trajectory)[-1]
    assert [i for i in ids if i in special] == pair * num_turns


# Laws 1 to 3 on random conversations --------------------------------------------------------------

both = pytest.mark.parametrize("name", ["example", QWEN])


@both
@bounded
@given(trajectory=trajectories(control=False))
def test_ids_and_spans_are_exact_where_nothing_is_forged(
    name: str, shared_data: Path, trajectory: Trajectory
) -> None:
    tokenizer = theirs(name, shared_data)
    ids, spans = encoded(ours(name, shared_data), trajectory)
    assert ids == oracle_ids(tokenizer, trajectory)
    assert_spans_are_exact(name, tokenizer, trajectory, ids, spans)
    assert_control_ids_are_the_templates(name, tokenizer, trajectory, ids)


@both
@bounded
@given(trajectory=trajectories())
def test_both_engines_give_the_same_tokens(
    name: str, shared_data: Path, trajectory: Trajectory
) -> None:
    fast, reference = (ours(name, shared_data, fast=choice) for choice in (True, False))
    conversations = fast.conversations(trajectory, history="full")
    (first,), (second,) = (loaded.encode(conversations) for loaded in (fast, reference))
    assert first.ids.tolist() == second.ids.tolist()
    assert first.step_chars.tolist() == second.step_chars.tolist()
    assert first.step_spans == second.step_spans
    assert first.part_spans == second.part_spans
    assert first.convention_spans == second.convention_spans


@both
def test_a_lone_surrogate_is_refused_with_its_code(name: str, shared_data: Path) -> None:
    for fast in (True, False):
        loaded = ours(name, shared_data, fast=fast)
        for content in ("a\ud800b", END + "\ud800", "é\udfff"):
            trajectory = trajectory_of(prompt("x"), action(content))
            with pytest.raises(FormatError, match=r"half of a surrogate pair \(U\+D[8F]"):
                loaded.encode(loaded.conversations(trajectory, history="full"))


@both
@bounded
@given(trajectory=trajectories(private_use=False))
def test_ids_are_those_of_sanitized_control_tokens_where_messages_hold_such_text(
    name: str, shared_data: Path, trajectory: Trajectory
) -> None:
    tokenizer = theirs(name, shared_data)
    ids, _ = encoded(ours(name, shared_data), trajectory)
    assert ids == oracle_ids(tokenizer, trajectory, sanitize_control_tokens=True)


@both
@bounded
@given(trajectory=trajectories(keys=texts()))
def test_no_content_forges_a_control_token_or_moves_a_span(
    name: str, shared_data: Path, trajectory: Trajectory
) -> None:
    tokenizer = theirs(name, shared_data)
    conversations = list(ours(name, shared_data).conversations(trajectory, history="full"))
    ids, spans = encoded(ours(name, shared_data), trajectory)
    text = b"".join(bytes_of(tokenizer, ids)).decode()
    assert nfc(text) == nfc(conversations[0].rendering.text)
    assert_spans_are_exact(name, tokenizer, trajectory, ids, spans)
    assert_control_ids_are_the_templates(name, tokenizer, trajectory, ids)


@both
@bounded
@given(trajectory=trajectories())
def test_chatml_without_thoughts_never_rewrites_history(
    name: str, shared_data: Path, trajectory: Trajectory
) -> None:
    loaded = ours(name, shared_data)
    (whole,) = loaded.conversations(trajectory, history="auto")
    assert loaded.renderer.rewrites_history(trajectory, whole, num_cuts=100) is None


# Single cases -------------------------------------------------------------------------------------


@both
def test_private_use_characters_survive(name: str, shared_data: Path) -> None:
    content = "".join(map(chr, range(0xF0000, 0xF0010))) + "\ue000"
    ids, spans = encoded(
        ours(name, shared_data), trajectory_of(prompt(content + END), action(content))
    )
    decoded = theirs(name, shared_data).decode(ids)
    assert decoded.count(content) == 2
    _, start, end = spans[0]
    assert theirs(name, shared_data).decode(ids[start:end]) == content + END


def test_transformers_takes_its_own_marks_out_of_content_and_we_do_not(shared_data: Path) -> None:
    """The one place where the oracle of law 3 is wrong: it drops U+F0000 and U+F0001."""
    trajectory = trajectory_of(prompt("\U000f0000a\U000f0001" + END), action("b"))
    tokenizer = theirs(QWEN, shared_data)
    sanitized = oracle_ids(tokenizer, trajectory, sanitize_control_tokens=True)
    ids, _ = encoded(ours(QWEN, shared_data), trajectory)
    assert "\U000f0000" not in tokenizer.decode(sanitized)
    assert "\U000f0000a\U000f0001<|im_end|>" in tokenizer.decode(ids)


def test_the_key_of_a_tool_argument_forges_no_control_token(shared_data: Path) -> None:
    """The other place: transformers leaves the keys of arguments as they are, as it says."""
    calls = call_of("f", json.dumps({"<|im_end|>": {"<|im_start|>": [END]}}))
    trajectory = trajectory_of(prompt("x"), action(None, tool_calls=calls))
    tokenizer = theirs(QWEN, shared_data)
    ids, _ = encoded(ours(QWEN, shared_data), trajectory)
    assert_control_ids_are_the_templates(QWEN, tokenizer, trajectory, ids)
    assert tokenizer.decode(ids).count(END) == 5
    sanitized = oracle_ids(tokenizer, trajectory, sanitize_control_tokens=True)
    assert sanitized.count(tokenizer.convert_tokens_to_ids(END)) == 4


def test_a_token_that_straddles_the_header_is_outside_the_span(shared_data: Path) -> None:
    loaded, tokenizer = ours(QWEN, shared_data), theirs(QWEN, shared_data)
    ids, ((_, start, end),) = encoded(loaded, trajectory_of(prompt("x"), action("\nhello")))
    assert tokenizer.convert_ids_to_tokens(ids[start - 3 : start]) == [START, "assistant", "ĊĊ"]
    assert tokenizer.decode(ids[start:end]) == "hello" + END


def test_an_empty_action_is_its_end_of_turn_alone(shared_data: Path) -> None:
    loaded, tokenizer = ours(QWEN, shared_data), theirs(QWEN, shared_data)
    ids, ((_, start, end),) = encoded(loaded, trajectory_of(prompt("x"), action("")))
    assert tokenizer.decode(ids[start:end]) == END


def test_arguments_that_no_tokenizer_takes_stay_the_text_that_they_were(shared_data: Path) -> None:
    lone, deep = '{"a": "\\ud800"}', '{"a":' * 800 + "1" + "}" * 800
    for raw in (lone, deep, "[1, 2]", "no JSON", ""):
        trajectory = trajectory_of(prompt("x"), action(None, tool_calls=call_of("f", raw)))
        ids, ((_, start, end),) = encoded(ours(QWEN, shared_data), trajectory)
        text = theirs(QWEN, shared_data).decode(ids[start:end])
        assert f'"arguments": {json.dumps(raw)}}}' in text


def test_a_conversation_without_a_message_to_render_is_refused(shared_data: Path) -> None:
    trajectory = trajectory_of(Message(role="exit", kind="artifact", content="bye"))
    with pytest.raises(FormatError, match="no message of a role that chat templates know"):
        encoded(ours("example", shared_data), trajectory)


# What a tokenizer.json may ask for ----------------------------------------------------------------


@pytest.mark.parametrize("setting", ["truncation", "padding", "trimmed offsets", "added tokens"])
def test_settings_of_a_tokenizer_json_change_neither_ids_nor_spans(
    setting: str, shared_data: Path
) -> None:
    """`apply_chat_template` truncates, pads and adds nothing, whatever the file says."""
    loaded = ours("example", shared_data)
    backend = Tokenizer.from_str(loaded.spec.backend)
    if setting == "truncation":
        backend.enable_truncation(10)
    elif setting == "padding":
        backend.enable_padding(length=1000)
    elif setting == "trimmed offsets":
        backend.post_processor = processors.ByteLevel(trim_offsets=True)
    else:
        backend.post_processor = processors.TemplateProcessing(
            "<|im_start|> $0", None, [(START, 1)]
        )
    template = loaded.spec.template.replace("'\\n' }}\n    {%- if", "': ' }}\n    {%- if")
    template = template.replace("assistant\\n", "assistant: ")  # a header that ends in a space
    spec = dataclasses.replace(loaded.spec, template=template)
    other = dataclasses.replace(spec, backend=backend.to_str())
    trajectory = trajectory_of(prompt("  hi  "), action("   there " + END), action("   x"))
    expected, found = encoded(spec.load(), trajectory), encoded(other.load(), trajectory)
    assert found == expected
    trained = [theirs("example", shared_data).decode(found[0][a:b]) for _, a, b in found[1]]
    assert trained[1].strip() == "x" + END


# Law 4: templates that rewrite history ------------------------------------------------------------


def thinking(content: str, thought: str) -> Message:
    return action(content, reasoning_content=thought)


def observed(content: str, role: str = "user") -> Message:
    return Message(role=role, kind="observation", content=content)


def test_qwen3_rewrites_the_thoughts_of_earlier_steps(shared_data: Path) -> None:
    """Each context is what the model saw, yet what it thought and wrote is no longer there."""
    loaded = ours("qwen3", shared_data)
    trajectory = trajectory_of(
        prompt("x"), thinking("one", "thought one"), observed("y"), thinking("two", "thought two")
    )
    with pytest.raises(
        FormatError, match="up to the end of step 0; use --history per-step or full"
    ):
        list(loaded.conversations(trajectory, history="auto"))


def test_qwen3_rewrites_what_a_later_question_ends(shared_data: Path) -> None:
    loaded = ours("qwen3", shared_data)
    messages = [prompt("x")]
    for step in range(5):
        messages += [thinking(f"act {step}", f"think {step}"), observed("seen", "tool")]
    messages += [observed("and now?"), thinking("last", "thought")]
    with pytest.raises(FormatError, match="rewrites what was there"):
        list(loaded.conversations(trajectory_of(*messages), history="auto"))


def with_template(name: str, shared_data: Path, turn: str) -> LoadedTokenizer:
    """A ChatML template that writes `turn` before each message's content."""
    source = (
        "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' }}"
        + turn
        + "{{- message.content + '<|im_end|>\\n' }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
    )
    return dataclasses.replace(ours(name, shared_data).spec, template=source).load()


def test_a_thought_in_the_middle_that_a_template_drops_later_is_found(shared_data: Path) -> None:
    """Neither the first nor the last step shows it; the first step with a field missing does."""
    loaded = with_template(
        *("example", shared_data),
        "{%- if loop.last and message.reasoning_content %}{{- message.reasoning_content }}"
        "{%- endif %}",
    )
    plain = [message for i in range(3) for message in (action(f"a{i}"), observed("y"))]
    messages = [prompt("x"), *plain, thinking("b", "hm"), observed("z"), *plain, action("end")]
    with pytest.raises(FormatError, match="up to the end of step 3"):
        list(loaded.conversations(trajectory_of(*messages), history="auto"))
    (whole,) = loaded.conversations(trajectory_of(*messages[:7], action("c")), history="auto")
    assert len(whole.spans) == 4


def test_a_hint_that_a_template_shows_only_before_an_answer_is_found(shared_data: Path) -> None:
    """All that was written stays; what the model saw when it wrote does not."""
    loaded = with_template(
        "example", shared_data, "{%- if loop.last and message.role == 'user' %}hint {%- endif %}"
    )
    trajectory = trajectory_of(prompt("x"), action("one"), observed("y"), action("two"))
    with pytest.raises(FormatError, match="before step 0"):
        list(loaded.conversations(trajectory, history="auto"))


def test_qwen3_keeps_thoughts_between_tool_calls(shared_data: Path) -> None:
    loaded = ours("qwen3", shared_data)
    messages = [prompt("x")]
    for step in range(4):
        messages += [thinking(f"act {step}", f"think {step}"), observed("seen", "tool")]
    (whole,) = loaded.conversations(trajectory_of(*messages), history="auto")
    written = [whole.rendering.text[start:end] for _, start, end in whole.spans]
    assert written == [f"<think>\nthink {step}\n</think>\n\nact {step}{END}" for step in range(4)]


@pytest.mark.parametrize("role", ["user", "tool"])
def test_per_step_gives_each_step_what_the_model_saw_and_one_span(
    role: str, shared_data: Path
) -> None:
    loaded, tokenizer = ours("qwen3", shared_data), theirs("qwen3", shared_data)
    messages = [Message(role="system", kind="prompt", content="s"), prompt("x")]
    for step in range(4):
        messages += [thinking(f"act {step}", f"think {step}"), observed("seen", role)]
    trajectory = trajectory_of(*messages)
    rows = loaded.encode(loaded.conversations(trajectory, history="per-step"))
    if role == "tool":  # Qwen3 keeps the thoughts between calls: all of it is one context
        assert rows[0].ids.tolist() == oracle_ids(tokenizer, trajectory)
        assert [step for step, _, _ in rows[0].step_spans] == [0, 1, 2, 3]
        assert len(rows) == 1
        return
    assert len(rows) == 4
    for step, row in enumerate(rows):
        ids = row.ids
        until = trajectory_of(*messages[: 3 + 2 * step])
        assert ids.tolist() == oracle_ids(tokenizer, until)
        ((number, start, end),) = row.step_spans
        assert number == step
        written = f"<think>\nthink {step}\n</think>\n\nact {step}{END}"
        assert tokenizer.decode(ids[start:end]) == written


def test_full_gives_the_final_rendering(shared_data: Path) -> None:
    loaded, tokenizer = ours("qwen3", shared_data), theirs("qwen3", shared_data)
    trajectory = trajectory_of(
        prompt("x"), thinking("one", "thought one"), observed("y"), thinking("two", "thought two")
    )
    conversations = list(loaded.conversations(trajectory, history="full"))
    (row,) = loaded.encode(conversations)
    ids, spans = row.ids, row.step_spans
    assert ids.tolist() == oracle_ids(tokenizer, trajectory)
    assert [tokenizer.decode(ids[start:end]) for _, start, end in spans] == [
        "one" + END,
        "<think>\nthought two\n</think>\n\ntwo" + END,
    ]
    assert loaded.renderer.findings(trajectory, conversations) == {"dropped_reasoning_content": 1}


def test_a_template_that_drops_the_end_of_its_generation_prompt_rewrites_history(
    shared_data: Path,
) -> None:
    """Qwen3 without thinking: the prompt ends in an empty thought that earlier turns lack."""
    template = shared_data / "templates" / "QwenLM" / "qwen3_nonthinking.jinja"
    spec = load_spec(str(shared_data / "tokenizers" / "qwen3"), template)
    trajectory = trajectory_of(prompt("x"), action("one"), observed("y"), action("two"))
    with pytest.raises(FormatError, match="before step 0"):
        list(spec.load().conversations(trajectory, history="auto"))
    rows = list(spec.load().conversations(trajectory, history="per-step"))
    written = [row.rendering.text[a:b] for row in rows for _, a, b in row.spans]
    assert written == ["one" + END, "two" + END]


# Loading ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({}, "cannot be loaded"),
        ({"tokenizer.json": "no JSON"}, "cannot be loaded"),
        ({"tokenizer.json": '{"added_tokens": []}'}, "cannot be loaded"),
    ],
)
def test_a_broken_tokenizer_is_one_clear_sentence(
    files: dict[str, str], reason: str, tmp_path: Path
) -> None:
    for name, text in {"tokenizer_config.json": "{}", **files}.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=reason) as raised:
        load_spec(str(tmp_path))
    assert str(tmp_path) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_tokenizer_with_several_templates_asks_which_one_inference_uses(tmp_path: Path) -> None:
    source = Path(tokenizer_path("example"))
    config = json.loads((source / "tokenizer_config.json").read_bytes())
    template = config["chat_template"]
    config["chat_template"] = [
        {"name": "default", "template": template},
        {"name": "tool_use", "template": template},
    ]
    (tmp_path / "tokenizer.json").write_bytes((source / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"several chat templates \(default, tool_use\)"):
        load_spec(str(tmp_path))
    chosen = tmp_path / "chosen.jinja"
    chosen.write_text(template, encoding="utf-8")
    assert load_spec(str(tmp_path), chosen).template == template
