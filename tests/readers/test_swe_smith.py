"""SWE-smith's rows: the same steps as the .traj files that they were made from."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from srft_prep.errors import FormatError
from srft_prep.readers import Origin, nebius, swe_agent, swe_smith
from srft_prep.types import Message, Trajectory

STEPS_UNLIKE_INDEX: dict[str, tuple[int, str]] = {}
"""File -> (steps read, why not INDEX's n_steps). Every file agrees today."""

OWNERS = {
    "swesmith-ft-jsonl": swe_smith,
    "adp-raw:swe-smith": swe_smith,
    "adp-raw:mini-coder": swe_smith,
    "adp-raw:nebius_SWE-agent-trajectories": nebius,
    "sweagent-traj": swe_agent,
    "sweagent-history-only": swe_agent,
}
"""INDEX's format -> the one of these three readers that takes it; all others are nobody's here."""

GOLDEN = ("pandas-dev__pandas.95280573.pr_53652", "pydantic__pydantic.acb0f10f.pr_8316")
"""The runs of which both sides are there: the third row has no .traj, the third .traj no row."""

BETWEEN_LINES = ("old_str", "new_str", "file_text")
"""Parameters whose values the xml style puts on lines of their own."""

ANYWHERE = Origin(path=Path("data/train.parquet"), line=3)

TASK = {"role": "user", "content": "task"}
LOOK = {"role": "assistant", "content": "look\n\n<function=bash>\n</function>"}
SEEN = {"role": "user", "content": "OBSERVATION:\na file"}


def row(*messages: Any, **more: Any) -> dict[str, Any]:
    return {"messages": list(messages), "instance_id": "owner__repo-1", "traj_id": "t"} | more


def read(record: Any) -> Trajectory:
    return swe_smith.read(record, origin=ANYWHERE)


def kinds(record: Any) -> list[str]:
    return [message.kind for message in read(record).messages]


def indexed(shared_data: Path) -> Iterator[tuple[dict[str, Any], list[Any]]]:
    """Yield INDEX's rows with the records of their files."""
    root = shared_data / "trajectories"
    for line in (root / "INDEX.jsonl").read_text().splitlines():
        entry = json.loads(line)
        path = root / entry["source"] / entry["path"]
        if path.suffix == ".jsonl":
            yield entry, [json.loads(text) for text in path.read_text().splitlines()]
        else:
            record = json.loads(path.read_text())
            rows = isinstance(record, list) and entry["format"].startswith("adp-raw")
            yield entry, record if rows else [record]


def test_every_file_has_the_steps_that_the_index_counts(shared_data: Path) -> None:
    counts = {
        entry["path"]: (sum(read(record).num_steps for record in records), entry["n_steps"])
        for entry, records in indexed(shared_data)
        if OWNERS.get(entry["format"]) is swe_smith
    }
    assert len(counts) == 3
    differing = {path: read for path, (read, counted) in counts.items() if read != counted}
    assert differing == {path: read for path, (read, _) in STEPS_UNLIKE_INDEX.items()}


def test_a_record_is_claimed_by_the_reader_of_its_format_only(shared_data: Path) -> None:
    for entry, records in indexed(shared_data):
        owner = OWNERS.get(entry["format"])
        for record in records:
            claims = [m for m in (nebius, swe_agent, swe_smith) if m.recognises(record)]
            assert claims == ([owner] if owner else []), entry["path"]


def test_outcome_files_are_nobodys_trajectories(shared_data: Path) -> None:
    for path in (shared_data / "trajectories").rglob("report.json"):
        record = json.loads(path.read_text())
        assert not any(m.recognises(record) for m in (nebius, swe_agent, swe_smith))


def in_xml_style(action: Message) -> str:
    """Return an answer with tool calls as SWE-smith's converter writes it."""
    blocks = []
    for call in json.loads(action.tool_calls or "[]"):
        lines = [f"<function={call['function']['name']}>"]
        for name, value in json.loads(call["function"]["arguments"]).items():
            text = f"\n{value}\n" if name in BETWEEN_LINES else value
            lines.append(f"<parameter={name}>{text}</parameter>")
        blocks.append("\n".join([*lines, "</function>"]))
    return (action.content or "") + "\n\n" + "\n".join(blocks)


@pytest.mark.parametrize("instance_id", GOLDEN)
def test_a_row_and_its_traj_file_give_the_same_steps(shared_data: Path, instance_id: str) -> None:
    logs = shared_data / "trajectories" / "SWE-bench__SWE-smith" / "tests" / "test_logs"
    path = logs / "trajectories" / instance_id / f"{instance_id}.traj"
    run = swe_agent.read(json.loads(path.read_text()), origin=Origin(path=path))
    records = map(json.loads, (logs / "ft_xml_example.jsonl").read_text().splitlines())
    (converted,) = [read(record) for record in records if record["instance_id"] == instance_id]

    assert [step.action.content for step in converted.steps] == [
        in_xml_style(step.action) for step in run.steps
    ]
    assert [message.content for step in converted.steps for message in step.observations] == [
        message.content for step in run.steps for message in step.observations
    ]
    assert [message.kind for message in run.messages] == [
        *(message.kind for message in converted.messages),
        "artifact",
    ]


def test_the_golden_rows_and_files_overlap_in_two_runs(shared_data: Path) -> None:
    logs = shared_data / "trajectories" / "SWE-bench__SWE-smith" / "tests" / "test_logs"
    lines = (logs / "ft_xml_example.jsonl").read_text().splitlines()
    rows = {json.loads(line)["instance_id"] for line in lines}
    files = {path.stem for path in logs.rglob("*.traj")}
    assert tuple(sorted(rows & files)) == GOLDEN


def test_messages_may_be_json_text() -> None:
    listed = row(TASK, LOOK, SEEN)
    text = listed | {"messages": json.dumps(listed["messages"])}
    assert swe_smith.recognises(text)
    assert read(text) == read(listed)


def test_content_is_kept_as_written() -> None:
    content = "  <think>\n\n</think>\r\n<function=bash>\n</function>  \n"
    assert read(row(TASK, {"role": "assistant", "content": content})).steps[0].action.content == (
        content
    )


def test_the_invented_submit_is_an_artifact() -> None:
    invented = {"role": "assistant", "content": swe_smith.INVENTED_SUBMIT}
    assert kinds(row(TASK, LOOK, SEEN, invented)) == ["prompt", "action", "observation", "artifact"]
    own = {"role": "assistant", "content": "You're right. " + swe_smith.INVENTED_SUBMIT}
    assert kinds(row(TASK, LOOK, SEEN, own))[-1] == "action"


@pytest.mark.parametrize("text", ["Exit due to cost limit", "Exit due to context window"])
def test_an_exit_of_the_harness_is_an_artifact(text: str) -> None:
    assert kinds(row(TASK, LOOK, SEEN, {"role": "assistant", "content": text}))[-1] == "artifact"


def test_the_tool_style_is_read_with_its_calls() -> None:
    calls = [
        {
            "function": {"arguments": '{"command":"ls"}', "name": "bash"},
            "id": "toolu_1",
            "index": 1,
            "type": "function",
        }
    ]
    messages = [
        [{"role": "user", "content": [{"type": "text", "text": "task"}], "agent": "main"}],
        [
            {
                "role": "assistant",
                "content": "look",
                "thought": "look",
                "action": "ls",
                "tool_calls": calls,
                "tool_call_ids": None,
                "message_type": "action",
            }
        ],
        {
            "role": "tool",
            "content": [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}],
            "tool_call_ids": ["toolu_1"],
            "tool_calls": None,
        },
    ]
    trajectory = read(row(*messages))
    (step,) = trajectory.steps
    assert json.loads(step.action.tool_calls or "") == [
        {key: value for key, value in calls[0].items() if key != "index"}
    ]
    assert step.observations[0].tool_call_id == "toolu_1"
    assert step.observations[0].content == "a"


def test_arguments_that_are_no_text_become_json_text() -> None:
    call = {"type": "function", "function": {"name": "bash", "arguments": {"command": "ls"}}}
    action = {"role": "assistant", "content": None, "tool_calls": [call]}
    message = read(row(TASK, action)).steps[0].action
    assert json.loads(message.tool_calls or "")[0]["function"]["arguments"] == '{"command":"ls"}'
    assert message.content is None


def test_an_answer_without_content_or_calls_is_empty() -> None:
    empty = {"role": "assistant", "content": None, "tool_calls": None, "function_call": None}
    assert read(row(TASK, empty)).steps[0].action.content == ""


@pytest.mark.parametrize(
    ("columns", "resolved"),
    [
        ({"resolved": True}, True),
        ({"resolved": 0}, False),
        ({"resolved": 1}, True),
        ({"resolved": -1}, None),
        ({"resolved": None}, None),
        ({"resolved": None, "verified": False}, False),
        ({"verified": True}, True),
        ({"reward": 1.0}, None),
    ],
)
def test_the_outcome(columns: dict[str, Any], resolved: bool | None) -> None:
    assert read(row(TASK, LOOK, **columns)).resolved is resolved


def test_a_final_message_with_the_patch_is_an_artifact() -> None:
    diff = "diff --git a/x b/x\n"
    record = row(TASK, LOOK, {"role": "user", "content": f"OBSERVATION:\n{diff}"})
    assert kinds(record | {"patch": diff})[-1] == "artifact"
    assert kinds(record | {"patch": ""})[-1] == "observation"
    assert kinds(record)[-1] == "observation"


def test_a_row_without_an_id_is_named_by_its_content() -> None:
    plain = row(TASK, LOOK, traj_id=None)
    name = read(plain).trajectory_id
    assert name.startswith("owner__repo-1.")
    assert read(plain | {"resolved": True}).trajectory_id == name
    assert read(row(TASK, LOOK, SEEN, traj_id=None)).trajectory_id != name
    assert read(row(TASK, LOOK, traj_id=None, trajectory_id="x")).trajectory_id == "x"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"messages": 3}, "field 'messages': expected a list or JSON text of one, got int"),
        ({"messages": "[{"}, "field 'messages': expected JSON text"),
        ({"messages": [TASK]}, "no action by a model among 1 messages"),
        ({"messages": [TASK, {"content": "x"}]}, "message 1: no role"),
        ({"messages": [TASK, 5]}, "message 1: expected an object, got int"),
        ({"messages": [{"role": "user", "content": {}}]}, "message 0: content: expected a string"),
        ({"messages": [LOOK | {"tool_calls": "x"}]}, "message 0: tool_calls: expected a list"),
        ({"messages": [LOOK | {"is_demo": "no"}]}, "message 0: field 'is_demo': expected bool"),
        ({"resolved": "yes"}, "field 'resolved': expected a bool, 0, 1 or -1, got 'yes'"),
        ({"resolved": 2}, "field 'resolved': expected a bool, 0, 1 or -1, got 2"),
        ({"resolved": [True]}, "field 'resolved': expected a bool, 0, 1 or -1, got list"),
        ({"patch": ["x"]}, "field 'patch': expected str, got list"),
        ({"instance_id": 7}, "field 'instance_id': expected str, got int"),
    ],
)
def test_a_broken_row_is_rejected_with_a_sentence(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(FormatError) as caught:
        read(row(TASK, LOOK) | change)
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [{"run_id": "r"}, {"test_result": {}}, {"trajectory_format": "mini-swe-agent-1"}, {"info": {}}],
)
def test_rows_of_other_formats_are_left_to_their_readers(change: dict[str, Any]) -> None:
    assert swe_smith.recognises(row(TASK, LOOK))
    assert not swe_smith.recognises(row(TASK, LOOK) | change)
    assert not swe_smith.recognises({"messages": [TASK, LOOK], "category": "general"})


GOOD: dict[ModuleType, dict[str, Any]] = {
    swe_smith: row(
        TASK,
        LOOK | {"tool_calls": [{"id": "a", "function": {"name": "bash", "arguments": {}}}]},
        {"role": "tool", "content": [{"type": "text", "text": "a"}], "tool_call_ids": ["a"]},
        resolved=1,
        tools=[{"type": "function", "function": {"name": "bash", "parameters": None}}],
    ),
    swe_agent: {
        "environment": "main",
        "replay_config": {"agent": {"model": {"name": "m"}}},
        "info": {"exit_status": "submitted", "submission": "diff"},
        "history": [TASK, LOOK | {"action": "ls", "thinking_blocks": [{"thinking": "hm"}]}, SEEN],
        "trajectory": [
            {"response": LOOK["content"], "action": "ls", "observation": "a file"},
            {"response": "bad", "action": "", "observation": "", "query": [TASK]},
            {"response": "end", "action": "submit", "query": [LOOK | {"content": "bad"}, SEEN]},
        ],
    },
    nebius: {
        "instance_id": "owner__repo-1",
        "target": True,
        "generated_patch": "diff",
        "trajectory": [
            {"role": "system", "system_prompt": "setting", "text": None, "mask": False},
            {"role": "ai", "system_prompt": None, "text": "look", "mask": True},
            {"role": "user", "text": "a file", "mask": False},
        ],
    },
}

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["role", "content", "messages", "trajectory", "history", "name", "text"]
            )
            | st.text(max_size=4),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@st.composite
def mutated(draw: st.DrawFn, record: Any) -> Any:
    """Draw a record in which one value, however deep, is replaced or taken out."""
    if not isinstance(record, (dict, list)) or not record or draw(st.integers(0, 3)) == 0:
        return draw(JSON)
    keys = list(record) if isinstance(record, dict) else list(range(len(record)))
    key = draw(st.sampled_from(keys))
    changed = record.copy()
    if draw(st.integers(0, 5)) == 0:
        del changed[key]
    else:
        changed[key] = draw(mutated(record[key]))
    return changed


def gives_a_trajectory_or_a_format_error(reader: ModuleType, record: Any) -> None:
    assert reader.recognises(record) in (True, False)
    try:
        trajectory = reader.read(record, origin=ANYWHERE)
    except FormatError:
        return
    assert trajectory.num_steps > 0
    assert trajectory.trajectory_id
    assert trajectory.content_hash


@pytest.mark.parametrize("reader", GOOD, ids=lambda reader: reader.__name__)
def test_the_good_records_are_good(reader: ModuleType) -> None:
    assert reader.recognises(GOOD[reader])
    assert reader.read(GOOD[reader], origin=ANYWHERE).num_steps > 0


@pytest.mark.parametrize("reader", GOOD, ids=lambda reader: reader.__name__)
@given(record=JSON)
def test_any_json_gives_a_trajectory_or_a_format_error(reader: ModuleType, record: Any) -> None:
    gives_a_trajectory_or_a_format_error(reader, record)


@pytest.mark.parametrize("reader", GOOD, ids=lambda reader: reader.__name__)
@settings(max_examples=300)
@given(data=st.data())
def test_any_mutation_gives_a_trajectory_or_a_format_error(
    reader: ModuleType, data: st.DataObject
) -> None:
    record = data.draw(mutated(GOOD[reader]))
    gives_a_trajectory_or_a_format_error(reader, data.draw(st.just(record) | mutated(record)))


def test_tools_nested_too_deeply_are_a_format_error() -> None:
    tool: Any = {}
    for _ in range(2_000):
        tool = {"items": tool}
    with pytest.raises(FormatError):
        read(row(TASK, LOOK, tools=[tool]))


def test_a_lone_surrogate_is_a_format_error() -> None:
    with pytest.raises(FormatError):
        read(row(TASK, {"role": "assistant", "content": "\ud800"}, traj_id=None))
