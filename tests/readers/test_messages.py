"""Plain chat rows; and the law of all readers that no JSON value breaks them."""

import copy
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from srft_prep.errors import FormatError
from srft_prep.readers import Origin, messages, mini_swe_agent, openhands, recognised
from srft_prep.types import Trajectory

STEPS_UNLIKE_INDEX: dict[str, tuple[int, str]] = {}
"""File -> (steps read, why not INDEX's n_steps). The one file agrees today."""

ANYWHERE = Origin(path=Path("data/chats.jsonl"), line=3)

TASK = {"role": "user", "content": " the task\n"}
LOOK = {"role": "assistant", "content": "look"}


def read(record: Any) -> Trajectory:
    return messages.read(record, origin=ANYWHERE)


def said(record: Any) -> list[tuple[str, str, str | None]]:
    return [(m.role, m.kind, m.content) for m in read(record).messages]


def indexed(shared_data: Path, formats: tuple[str, ...]) -> list[tuple[dict[str, Any], list[Any]]]:
    root = shared_data / "trajectories"
    entries = [
        json.loads(line) for line in (root / "INDEX.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    return [
        (entry, json.loads((root / entry["source"] / entry["path"]).read_bytes()))
        for entry in entries
        if entry["format"] in formats
    ]


def test_the_sample_has_the_steps_that_the_index_counts(shared_data: Path) -> None:
    ((entry, rows),) = indexed(shared_data, ("adp-raw:swe-play-trajectories",))
    assert all(recognised(row) is messages for row in rows)
    differing = {}
    steps = sum(read(row).num_steps for row in rows)
    if steps != entry["n_steps"]:
        differing[entry["path"]] = steps
    assert differing == {path: steps for path, (steps, _) in STEPS_UNLIKE_INDEX.items()}
    assert len(rows) == entry["n_traj"]
    assert [read(row).trajectory_id for row in rows] == [f"swe-play-{n}" for n in range(5)]


def test_a_row_that_another_reader_knows_better_is_left_to_it(shared_data: Path) -> None:
    formats = ("adp-raw:mini-coder", "adp-raw:swe-smith", "adp-raw:nebius_SWE-agent-trajectories")
    for entry, rows in indexed(shared_data, formats):
        for row in rows:
            assert recognised(row) not in (None, messages, mini_swe_agent, openhands), entry["path"]


def test_content_is_kept_as_it_is() -> None:
    record = {"messages": [TASK, {"role": "assistant", "content": None}, TASK]}
    assert said(record) == [
        ("user", "prompt", " the task\n"),
        ("assistant", "action", ""),
        ("user", "observation", " the task\n"),
    ]


def test_messages_may_be_json_text() -> None:
    record = {"messages": json.dumps([TASK, LOOK]), "tools": '[{"type": "function"}]'}
    assert messages.recognises(record)
    assert read(record).num_steps == 1
    assert read(record).tools == '[{"type":"function"}]'


def test_sharegpt_speakers_become_roles() -> None:
    record = {
        "system": "You are helpful",
        "conversations": [
            {"from": "human", "value": "the task"},
            {"from": "function_call", "value": '{"name": "ls", "arguments": {}}'},
            {"from": "observation", "value": "a"},
            {"from": "gpt", "value": "done"},
        ],
    }
    assert messages.recognises(record)
    assert said(record) == [
        ("system", "prompt", "You are helpful"),
        ("user", "prompt", "the task"),
        ("assistant", "action", '{"name": "ls", "arguments": {}}'),
        ("tool", "observation", "a"),
        ("assistant", "action", "done"),
    ]


def test_the_other_fields_are_taken_where_they_are_there() -> None:
    record = {
        "id": 17,
        "instance_id": "owner__repo-1",
        "resolved": False,
        "model": "m",
        "exit_status": "submitted",
        "patch": "diff",
        "messages": [TASK, LOOK],
    }
    trajectory = read(record)
    assert (trajectory.trajectory_id, trajectory.instance_id) == ("17", "owner__repo-1")
    assert (trajectory.resolved, trajectory.model) == (False, "m")
    assert (trajectory.exit_status, trajectory.patch) == ("submitted", "diff")
    assert read({"messages": [TASK, LOOK]}).trajectory_id.startswith("chats.")


@pytest.mark.parametrize("words", ["Exit due to cost limit", "Exit due to context window"])
def test_words_of_the_harness_are_no_step(words: str) -> None:
    record = {"messages": [TASK, LOOK, {"role": "assistant", "content": words}]}
    assert [kind for _, kind, _ in said(record)] == ["prompt", "action", "artifact"]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"messages": [TASK]}, "no action"),
        ({"messages": []}, "no action"),
        ({"messages": [TASK, LOOK], "model": 3}, "record: field 'model': expected str, got int"),
        ({"messages": [TASK, LOOK], "id": True}, "record: field 'id': expected str, got bool"),
        ({"messages": "[{"}, "field 'messages': expected JSON text"),
        ({"conversations": [{"from": "martian", "value": ""}]}, "message 0: field 'from'"),
        ({"conversations": [{"from": "gpt", "value": 3}]}, "message 0: content: expected a string"),
        ({}, "field 'conversations': expected a list"),
    ],
)
def test_a_broken_row_says_where_and_what(record: Any, reason: str) -> None:
    with pytest.raises(FormatError, match=reason):
        read(record)


@pytest.mark.parametrize(
    "record",
    [
        3,
        [TASK, LOOK],
        {"messages": []},
        {"messages": "not JSON"},
        {"messages": ["text"]},
        {"messages": [TASK], "response": {}, "args": [], "kwargs": {}},
        {"model_patch": "diff"},
    ],
)
def test_records_without_messages_are_not_claimed(record: Any) -> None:
    assert not messages.recognises(record)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)

CALL = {"id": "a", "type": "function", "function": {"name": "bash", "arguments": "{}"}}
RESPONSE = {
    "id": "r",
    "model": "m",
    "choices": [{"message": {"role": "assistant", "content": "look", "tool_calls": [CALL]}}],
}
MADE_BY = {"function_name": "bash", "tool_call_id": "a", "model_response": RESPONSE}
GOOD: list[tuple[ModuleType, Any]] = [
    (
        messages,
        {
            "id": "x",
            "messages": [TASK, LOOK | {"tool_calls": [CALL]}],
            "tools": [{"type": "function"}],
        },
    ),
    (messages, {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}),
    (
        mini_swe_agent,
        {
            "info": {"exit_status": "Submitted", "submission": "d", "config": {"model": {}}},
            "messages": [TASK, LOOK, {"role": "user", "content": "d"}],
            "trajectory_format": "mini-swe-agent-1",
        },
    ),
    (mini_swe_agent, [TASK, LOOK, TASK]),
    (
        openhands,
        {
            "instance_id": "i",
            "metadata": {"llm_config": {"max_message_chars": 9}, "eval_output_dir": "/a/b"},
            "test_result": {"git_patch": "d", "report": {"resolved": True}},
            "history": [
                {"source": "agent", "action": "system", "args": {"content": "s", "tools": []}},
                {"source": "user", "action": "message", "args": {"content": "task"}},
                {"source": "agent", "action": "run", "args": {}, "tool_call_metadata": MADE_BY},
                {
                    "source": "agent",
                    "observation": "run",
                    "content": "a",
                    "extras": {"metadata": {"exit_code": 1, "working_dir": "/w"}},
                    "tool_call_metadata": MADE_BY,
                },
            ],
        },
    ),
    (
        openhands,
        [
            {"action": "message", "content": "task <function="},
            {"action": "edit", "path": "/a", "content": "b", "thought": "c"},
            {"observation": "edit", "content": "", "extras": {"formatted_output_and_error": "x"}},
            [{"action": "delegate", "inputs": {"task": "t"}}, {"observation": "delegate"}],
        ],
    ),
    (
        openhands,
        {"run_id": "r", "instance_id": "i", "messages": [TASK, LOOK], "test_result": {}},
    ),
]


@pytest.mark.parametrize("reader", [messages, mini_swe_agent, openhands])
@given(record=json_values)
@settings(max_examples=200, deadline=None)
def test_any_json_value_is_a_trajectory_or_a_format_error(reader: ModuleType, record: Any) -> None:
    assert reader.recognises(record) in (True, False)
    assert_read_or_refused(reader, record)


@pytest.mark.parametrize(("reader", "good"), GOOD)
@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_any_damage_gives_a_trajectory_or_a_format_error(
    reader: ModuleType, good: Any, data: st.DataObject
) -> None:
    record = copy.deepcopy(good)
    assert isinstance(reader.read(record, origin=ANYWHERE), Trajectory)
    for _ in range(data.draw(st.integers(1, 3))):
        owner, key = data.draw(st.sampled_from(places(record)))
        owner[key] = data.draw(json_values | st.sampled_from(["", [], {}, None, 0, True]))
        if not places(record):
            break
    assert reader.recognises(record) in (True, False)
    assert_read_or_refused(reader, record)


def test_deep_nesting_is_refused_and_does_not_overflow() -> None:
    deep: Any = []
    for _ in range(900):
        deep = [deep]
    for record in (
        {"messages": [TASK, LOOK], "tools": [{"a": deep}]},
        {"messages": [TASK, LOOK | {"tool_calls": [CALL | {"deep": deep}]}]},
    ):
        with pytest.raises(FormatError):
            read(record)


def places(value: Any) -> list[tuple[Any, Any]]:
    """Return every (container, key) below a value."""
    if isinstance(value, dict):
        keys: list[Any] = list(value)
    elif isinstance(value, list):
        keys = list(range(len(value)))
    else:
        return []
    here = [(value, key) for key in keys]
    return here + [place for key in keys for place in places(value[key])]


def assert_read_or_refused(reader: ModuleType, record: Any) -> None:
    try:
        trajectory = reader.read(record, origin=ANYWHERE)
    except FormatError:
        return
    assert trajectory.trajectory_id
    assert trajectory.messages
    assert trajectory.content_hash
