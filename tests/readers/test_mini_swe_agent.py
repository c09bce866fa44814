"""mini-swe-agent's files: all three shapes, and what the harness writes after the run's end."""

import json
from pathlib import Path
from typing import Any

import pytest

from srft_prep.errors import FormatError
from srft_prep.readers import Origin, mini_swe_agent, recognised
from srft_prep.types import Trajectory

STEPS_UNLIKE_INDEX: dict[str, tuple[int, str]] = {}
"""File -> (steps read, why not INDEX's n_steps). Every file agrees today."""

FAILED_BEFORE_THE_FIRST_ACTION = {
    "pvlib__pvlib-python-1854": "InternalServerError",
    "pylint-dev__astroid-1196": "Timeout",
    "pylint-dev__astroid-1333": "Timeout",
    "pylint-dev__astroid-1978": "Timeout",
}
"""Runs of deepseek_reasoner_dev whose provider never answered; INDEX counts them too."""

FILE = Origin(path=Path("output/some_run/owner__repo-1/owner__repo-1.traj.json"))
ROW = Origin(path=Path("train.parquet"), line=7)

SYSTEM = {"role": "system", "content": "You are a helpful assistant"}
TASK = {"role": "user", "content": "the task"}
LOOK = {"role": "assistant", "content": "THOUGHT: look\n\n```bash\nls\n```", "extra": {"cost": 1}}
SEEN = {"role": "user", "content": "<returncode>0</returncode>\n<output>\na\n</output>"}
SUBMIT = {
    "role": "assistant",
    "content": "done\n\n```bash\necho COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT\n```",
}
PATCH = {"role": "user", "content": "diff --git a/x b/x\n"}


def v1(*messages: Any, status: str | None = "Submitted", submission: str | None = None) -> Any:
    info = {
        "exit_status": status,
        "submission": PATCH["content"] if submission is None else submission,
        "mini_version": "1.15.0",
        "config": {"model": {"model_name": "google/gemini-3-pro-preview"}},
    }
    return {
        "info": info,
        "messages": list(messages),
        "trajectory_format": "mini-swe-agent-1",
        "instance_id": "owner__repo-1",
    }


def call(identifier: str, command: str) -> dict[str, Any]:
    function = {"name": "bash", "arguments": json.dumps({"command": command})}
    return {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"index": 0, "function": function, "id": identifier, "type": "function"}],
        "function_call": None,
        "provider_specific_fields": {"refusal": None},
        "reasoning_content": "let me see",
        "extra": {"actions": [{"command": command, "tool_call_id": identifier}]},
    }


def v2(*messages: Any, status: str = "Submitted") -> Any:
    return v1(*messages, status=status) | {"trajectory_format": "mini-swe-agent-1.1"}


def read(record: Any, origin: Origin = FILE) -> Trajectory:
    return mini_swe_agent.read(record, origin=origin)


def said(record: Any) -> list[tuple[str, str, str | None]]:
    return [(m.role, m.kind, m.content) for m in read(record).messages]


def indexed(shared_data: Path) -> list[tuple[dict[str, Any], Path, Any]]:
    root = shared_data / "trajectories"
    rows = [
        json.loads(line) for line in (root / "INDEX.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    files = [(row, root / row["source"] / row["path"]) for row in rows]
    return [
        (row, path, json.loads(path.read_bytes()))
        for row, path in files
        if row["format"] == "mini-swe-agent"
    ]


def test_every_file_is_read_with_the_steps_that_the_index_counts(shared_data: Path) -> None:
    files = indexed(shared_data)
    assert len(files) == 109
    differing = {}
    for row, path, record in files:
        assert recognised(record) is mini_swe_agent
        trajectory = read(record, Origin(path=path))
        if trajectory.num_steps != row["n_steps"]:
            differing[row["path"]] = trajectory.num_steps
        if row["instance_id"]:
            assert trajectory.instance_id == row["instance_id"]
    assert differing == {path: steps for path, (steps, _) in STEPS_UNLIKE_INDEX.items()}


def test_every_file_has_an_id_of_its_own_that_names_its_run(shared_data: Path) -> None:
    ids = {
        read(record, Origin(path=path)).trajectory_id for _, path, record in indexed(shared_data)
    }
    assert len(ids) == 109
    assert "deepseek_chat_dev/pydicom__pydicom-901" in ids
    assert "deepseek_chat_dev_rerun/pydicom__pydicom-901" in ids
    assert "20251118_gemini-3-pro-74pct/sympy__sympy-23824" in ids


def test_every_submission_is_the_patch_and_no_observation(shared_data: Path) -> None:
    for row, path, record in indexed(shared_data):
        trajectory = read(record, Origin(path=path))
        last = trajectory.messages[-1]
        assert last.kind == "artifact", row["path"]
        assert sum(message.kind == "artifact" for message in trajectory.messages) == 1
        if trajectory.exit_status == "Submitted":
            assert last.content == trajectory.patch


def test_runs_that_failed_before_their_first_action_are_taken(shared_data: Path) -> None:
    failed = {
        trajectory.instance_id: trajectory.exit_status
        for _, path, record in indexed(shared_data)
        if (trajectory := read(record, Origin(path=path))).num_steps == 0
    }
    assert failed == FAILED_BEFORE_THE_FIRST_ACTION


def test_every_tool_message_answers_a_call_before_it(shared_data: Path) -> None:
    for _, path, record in indexed(shared_data):
        calls: set[str] = set()
        for message in read(record, Origin(path=path)).messages:
            if message.role == "tool":
                assert message.tool_call_id in calls
            calls |= {item["id"] for item in json.loads(message.tool_calls or "[]")}


def test_v1_has_actions_in_text_and_observations_from_the_user() -> None:
    record = v1(SYSTEM, TASK, LOOK, SEEN, SUBMIT, PATCH)
    assert said(record) == [
        ("system", "prompt", SYSTEM["content"]),
        ("user", "prompt", "the task"),
        ("assistant", "action", LOOK["content"]),
        ("user", "observation", SEEN["content"]),
        ("assistant", "action", SUBMIT["content"]),
        ("user", "artifact", PATCH["content"]),
    ]
    trajectory = read(record)
    assert (trajectory.trajectory_id, trajectory.instance_id) == (
        "some_run/owner__repo-1",
        "owner__repo-1",
    )
    assert (trajectory.model, trajectory.exit_status) == (
        "google/gemini-3-pro-preview",
        "Submitted",
    )
    assert (trajectory.patch, trajectory.resolved, trajectory.tools) == (
        PATCH["content"],
        None,
        None,
    )


def test_v1_without_a_submission_keeps_its_last_observation() -> None:
    crashed = v1(TASK, LOOK, SEEN, status="Timeout", submission="the provider timed out")
    assert said(crashed)[-1] == ("user", "observation", SEEN["content"])
    assert read(crashed).patch is None
    limited = v1(TASK, LOOK, SEEN, {"role": "user", "content": ""}, status="LimitsExceeded")
    limited["info"]["submission"] = ""
    assert [kind for _, kind, _ in said(limited)][-2:] == ["observation", "artifact"]


def test_v2_keeps_calls_and_thoughts_and_drops_the_noise() -> None:
    tool = {"role": "tool", "tool_call_id": "a", "content": "seen", "extra": {"returncode": 0}}
    wrong = {
        "role": "user",
        "content": "Tool call error",
        "extra": {"interrupt_type": "FormatError"},
    }
    over = {"role": "exit", "content": PATCH["content"], "extra": {"exit_status": "Submitted"}}
    trajectory = read(v2(SYSTEM, TASK, call("a", "ls"), tool, wrong, call("b", "echo"), over))
    assert [(m.role, m.kind) for m in trajectory.messages] == [
        ("system", "prompt"),
        ("user", "prompt"),
        ("assistant", "action"),
        ("tool", "observation"),
        ("user", "observation"),
        ("assistant", "action"),
        ("exit", "artifact"),
    ]
    action = trajectory.messages[2]
    assert (action.content, action.reasoning_content) == (None, "let me see")
    assert json.loads(action.tool_calls or "") == [
        {
            "function": {"name": "bash", "arguments": '{"command": "ls"}'},
            "id": "a",
            "type": "function",
        }
    ]
    assert trajectory.messages[3].tool_call_id == "a"
    assert trajectory.tools is None


def test_a_bare_list_takes_its_name_from_the_file() -> None:
    origin = Origin(path=Path("history/local.4ceb7218.traj.json"))
    trajectory = read([SYSTEM, TASK, LOOK, SEEN, SUBMIT, PATCH], origin)
    assert trajectory.instance_id == "local.4ceb7218"
    assert trajectory.trajectory_id == "history/local.4ceb7218"
    assert trajectory.messages[-1].kind == "artifact"
    stopped = read([SYSTEM, TASK, LOOK, SEEN], origin)
    assert stopped.messages[-1].kind == "observation"


def test_rows_of_a_data_set_are_told_apart_by_their_content() -> None:
    row = {
        "instance_id": "owner__repo-1",
        "messages": [SYSTEM, TASK, LOOK, SEEN],
        "trajectory_format": "mini-swe-agent-1",
        "exit_status": "incomplete",
        "duration_sec": 3.5,
    }
    other = row | {"messages": [SYSTEM, TASK, LOOK, SEEN, SUBMIT]}
    assert mini_swe_agent.recognises(row)
    first, second = read(row, ROW), read(other, ROW)
    assert first.trajectory_id.startswith("owner__repo-1.")
    assert first.trajectory_id != second.trajectory_id
    assert first.exit_status == "incomplete"
    assert first.messages[-1].kind == "observation"


def test_a_record_without_an_action_must_say_how_it_failed() -> None:
    over = {"role": "exit", "content": "timed out", "extra": {}}
    failed = read(v2(SYSTEM, TASK, over, status="Timeout"))
    assert (failed.num_steps, failed.exit_status) == (0, "Timeout")
    assert [message.kind for message in failed.messages] == ["prompt", "prompt", "artifact"]
    with pytest.raises(FormatError, match="no action"):
        read(v2(SYSTEM, TASK, over, status="Submitted"))
    with pytest.raises(FormatError, match="no action"):
        read(v2(status="Timeout"))


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (v1(TASK, LOOK, {"role": "user", "content": 3}), r"message 2: content: expected a string"),
        (v1(TASK, LOOK, {"content": "x"}), r"message 2: no role"),
        (v1(TASK, LOOK, "x"), r"message 2: expected an object, got str"),
        (v1(TASK, LOOK) | {"info": []}, r"record: field 'info': expected dict, got list"),
        (v1(TASK, LOOK) | {"messages": {}}, r"field 'messages': expected a list"),
        (7, r"expected an object or a list, got int"),
    ],
)
def test_a_broken_record_says_where_and_what(record: Any, reason: str) -> None:
    with pytest.raises(FormatError, match=reason):
        read(record)


@pytest.mark.parametrize(
    "record",
    [
        [],
        [{"instance_id": "a", "model_patch": "diff", "model_name_or_path": "m"}],
        [{"action": "run", "args": {}}],
        {"messages": [TASK, LOOK], "instance_id": "a", "traj_id": "b"},
        {"messages": [TASK, LOOK], "trajectory_format": "another"},
        {"info": {"mini_version": "2"}, "trajectory": []},
    ],
)
def test_other_records_are_not_claimed(record: Any) -> None:
    assert not mini_swe_agent.recognises(record)
