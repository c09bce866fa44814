"""OpenHands: one step a model response, and observations as the model saw them."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from srft_prep.errors import FormatError
from srft_prep.readers import Origin, openhands, recognised
from srft_prep.types import Trajectory

STEPS_UNLIKE_INDEX = {
    "tests/runtime/trajs/basic.json": (2, "INDEX counts the events of an event list"),
    "tests/runtime/trajs/basic_gui_mode.json": (5, "INDEX counts the events of an event list"),
    "tests/runtime/trajs/basic_interactions.json": (3, "INDEX counts the events of an event list"),
    "tests/runtime/trajs/wrong_initial_state.json": (4, "INDEX counts the events of an event list"),
    "tests/unit/resolver/mock_output/output.jsonl": (
        26,
        "INDEX looks for actions with source 'agent'; these events name no source",
    ),
    "java_benchmark_run_20260128_064956/output_backup_065059.jsonl": (
        88,
        "INDEX counts actions: 90, of which two pairs share a response each (parallel calls)",
    ),
}
"""File -> (steps read, why not INDEX's n_steps)."""

PREDICTIONS = "evaluation/benchmarks/swe_bench/examples/example_model_output.json"
"""INDEX lists it among the event lists, but it is a list of patches: no trajectory."""

ANYWHERE = Origin(path=Path("runs/output.jsonl"), line=1)

SYSTEM = {
    "id": 0,
    "source": "agent",
    "action": "system",
    "args": {"content": "You are OpenHands agent", "tools": [{"type": "function"}]},
}
TASK = {"id": 1, "source": "user", "action": "message", "args": {"content": "the task"}}
RECALL = {"id": 2, "source": "user", "action": "recall", "args": {"query": "the task"}}
RECALLED = {
    "id": 3,
    "source": "environment",
    "observation": "recall",
    "content": "Added workspace context",
    "extras": {"microagent_knowledge": []},
}


def metadata(response: str, call: str, calls: list[str], content: str | None = "look") -> Any:
    tool_calls = [
        {"id": one, "type": "function", "function": {"name": "execute_bash", "arguments": "{}"}}
        for one in calls
    ]
    message = {"role": "assistant", "content": content, "tool_calls": tool_calls or None}
    return {
        "function_name": "execute_bash",
        "tool_call_id": call,
        "model_response": {"id": response, "model": "gpt-4o", "choices": [{"message": message}]},
        "total_calls_in_response": len(calls),
    }


def run(response: str, call: str, calls: list[str]) -> dict[str, Any]:
    return {
        "source": "agent",
        "action": "run",
        "args": {"command": "ls", "thought": "look"},
        "tool_call_metadata": metadata(response, call, calls),
    }


def output(response: str, call: str, calls: list[str], content: str = "a", **extras: Any) -> Any:
    return {
        "source": "agent",
        "observation": "run",
        "content": content,
        "extras": extras,
        "tool_call_metadata": metadata(response, call, calls),
    }


def row(*events: Any, **more: Any) -> dict[str, Any]:
    record = {
        "instance_id": "owner__repo-1",
        "test_result": {"git_patch": "diff"},
        "metadata": {
            "llm_config": {"model": "openai/gpt-4o", "max_message_chars": 100},
            "eval_output_dir": "/home/someone/outputs/gpt-4o_maxiter_30",
        },
        "history": list(events),
        "error": None,
    }
    return record | more


def read(record: Any) -> Trajectory:
    return openhands.read(record, origin=ANYWHERE)


def said(record: Any) -> list[tuple[str, str, str | None]]:
    return [(m.role, m.kind, m.content) for m in read(record).messages]


def indexed(shared_data: Path) -> Iterator[tuple[dict[str, Any], list[Any]]]:
    """Yield INDEX's rows of this reader's formats with the records of their files."""
    root = shared_data / "trajectories"
    for text in (root / "INDEX.jsonl").read_text(encoding="utf-8").splitlines():
        entry = json.loads(text)
        path = root / entry["source"] / entry["path"]
        if path.suffix == ".jsonl" and entry["format"].startswith("openhands"):
            yield entry, [json.loads(line) for line in path.read_bytes().splitlines()]
        elif entry["format"].startswith("openhands"):
            yield entry, [json.loads(path.read_bytes())]
        elif entry["format"].startswith("adp-raw:swe-gym"):
            yield entry, json.loads(path.read_bytes())


def trajectories(shared_data: Path) -> Iterator[Trajectory]:
    for entry, records in indexed(shared_data):
        if entry["path"] != PREDICTIONS:
            yield from map(read, records)


def test_every_file_is_read_with_the_steps_that_the_index_counts(shared_data: Path) -> None:
    differing = {}
    files = [(entry, records) for entry, records in indexed(shared_data)]
    assert len(files) == 10
    for entry, records in files:
        if entry["path"] == PREDICTIONS:
            continue
        assert all(recognised(record) is openhands for record in records)
        assert len(records) == entry["n_traj"]
        steps = sum(read(record).num_steps for record in records)
        if steps != entry["n_steps"]:
            differing[entry["path"]] = steps
    assert differing == {path: steps for path, (steps, _) in STEPS_UNLIKE_INDEX.items()}


def test_predictions_are_no_trajectories(shared_data: Path) -> None:
    (predictions,) = [r for entry, r in indexed(shared_data) if entry["path"] == PREDICTIONS]
    (entries,) = predictions
    assert not openhands.recognises(entries)
    assert recognised(entries) is None
    assert not any(recognised(entry) for entry in entries)


def test_every_row_has_an_id_of_its_own(shared_data: Path) -> None:
    ids = [trajectory.trajectory_id for trajectory in trajectories(shared_data)]
    assert len(set(ids)) == len(ids)
    assert "gpt-4o_maxiter_30/elastic__logstash-16482" in ids
    assert not any("//" in name or name.startswith("/") for name in ids)


def test_every_tool_message_answers_a_call_before_it(shared_data: Path) -> None:
    for trajectory in trajectories(shared_data):
        calls: set[str] = set()
        for message in trajectory.messages:
            if message.role == "tool":
                assert message.tool_call_id in calls
                assert message.name
            calls |= {call["id"] for call in json.loads(message.tool_calls or "[]")}


def test_runs_that_failed_before_their_first_action_are_taken(shared_data: Path) -> None:
    failed = [t for t in trajectories(shared_data) if t.num_steps == 0]
    assert [t.exit_status for t in failed] == ["STATUS$ERROR_LLM_AUTHENTICATION"] * 4
    assert all([m.kind for m in t.messages] == ["prompt", "prompt"] for t in failed)


def test_sampled_rows_carry_their_outcome_tools_and_patch(shared_data: Path) -> None:
    (rows,) = [r for entry, r in indexed(shared_data) if entry["format"].startswith("adp-raw")]
    for record in rows:
        trajectory = read(record)
        assert trajectory.resolved is record["resolved"]
        assert trajectory.patch == record["test_result"]["git_patch"]
        assert trajectory.trajectory_id == f"{record['run_id']}/{record['instance_id']}"
        # Parquet fills the slots of unused parameters with nulls; no model saw those.
        assert "file_text" not in str(json.loads(trajectory.tools or "")[0])
        assert len(trajectory.messages) == len(record["messages"])


def test_a_response_with_parallel_calls_is_one_step() -> None:
    both = ["a", "b"]
    record = row(
        SYSTEM,
        TASK,
        RECALL,
        RECALLED,
        run("r1", "a", both),
        output("r1", "a", both, "first"),
        run("r1", "b", both),
        output("r1", "b", both, "second"),
    )
    trajectory = read(record)
    assert said(record) == [
        ("system", "prompt", "You are OpenHands agent"),
        ("user", "prompt", "the task"),
        ("assistant", "action", "look"),
        ("tool", "observation", "first"),
        ("tool", "observation", "second"),
    ]
    assert [m.tool_call_id for m in trajectory.messages] == [None, None, None, "a", "b"]
    assert trajectory.messages[3].name == "execute_bash"
    assert len(json.loads(trajectory.messages[2].tool_calls or "")) == 2
    assert json.loads(trajectory.tools or "") == [{"type": "function"}]
    assert (trajectory.trajectory_id, trajectory.model) == (
        "gpt-4o_maxiter_30/owner__repo-1",
        "openai/gpt-4o",
    )
    assert (trajectory.patch, trajectory.exit_status, trajectory.resolved) == ("diff", None, None)


def test_a_command_output_reads_as_the_model_saw_it() -> None:
    seen = {
        "exit_code": 1,
        "working_dir": "/w",
        "py_interpreter_path": "/p",
        "prefix": "",
        "suffix": "!",
    }
    record = row(TASK, run("r", "a", ["a"]), output("r", "a", ["a"], "out", metadata=seen))
    assert said(record)[-1] == (
        "tool",
        "observation",
        "out!\n[Current working directory: /w]\n[Python interpreter: /p]"
        "\n[Command finished with exit code 1]",
    )
    running = seen | {"exit_code": -1, "working_dir": None, "py_interpreter_path": None}
    record = row(TASK, run("r", "a", ["a"]), output("r", "a", ["a"], "out", metadata=running))
    assert said(record)[-1][2] == "out!"


def test_an_observation_longer_than_the_limit_loses_its_middle() -> None:
    record = row(TASK, run("r", "a", ["a"]), output("r", "a", ["a"], "x" * 60 + "y" * 60))
    shown = said(record)[-1][2]
    assert shown == "x" * 50 + "\n[... Observation truncated due to length ...]\n" + "y" * 50


def test_the_shared_run_with_a_huge_output_shows_what_the_model_saw(shared_data: Path) -> None:
    lengths = [
        len(message.content or "")
        for trajectory in trajectories(shared_data)
        for message in trajectory.messages
        if message.role == "tool"
    ]
    assert max(lengths) < 31_000  # The event itself holds 946,322 characters.


def test_an_edit_shows_the_tools_words_and_not_the_users_diff() -> None:
    edit = output("r", "a", ["a"], "--- a\n+++ b", formatted_output_and_error="File created")
    record = row(TASK, run("r", "a", ["a"]), edit | {"observation": "edit"})
    assert said(record)[-1][2] == "File created"


def test_errors_and_replies_are_observations_and_states_are_not_seen() -> None:
    error = {"source": "agent", "observation": "error", "content": "Missing parameter"}
    state = {"source": "environment", "observation": "agent_state_changed", "content": ""}
    null = {"source": "user", "observation": "null", "content": "", "cause": 4}
    change = {"source": "environment", "action": "change_agent_state", "args": {}}
    talk = {"source": "agent", "action": "message", "args": {"content": "Done?"}}
    reply = {"source": "user", "action": "message", "args": {"content": "Please continue"}}
    finish = run("r2", "b", ["b"]) | {"action": "finish", "args": {"thought": ""}}
    record = row(
        TASK, state, run("r", "a", ["a"]), error, null, change, talk, reply, RECALL, finish
    )
    assert said(record) == [
        ("user", "prompt", "the task"),
        ("assistant", "action", "look"),
        (
            "user",
            "observation",
            "Missing parameter\n[Error occurred in processing last action]",
        ),
        ("assistant", "action", "Done?"),
        ("user", "observation", "Please continue"),
        ("assistant", "action", "look"),
    ]
    assert read(record).exit_status == "finish"


def test_a_run_by_the_user_is_shown_as_such() -> None:
    record = row(
        TASK,
        run("r", "a", ["a"]),
        {"source": "user", "action": "run", "args": {"command": "pwd"}},
        {"source": "user", "observation": "run", "content": "/w", "extras": {}},
    )
    assert [text for _, _, text in said(record)][2:] == [
        "User executed the command:\npwd",
        "\nObserved result of command executed by user:\n/w",
    ]


def test_old_events_become_tagged_text_whether_in_pairs_or_flat() -> None:
    task = {"action": "message", "content": "Fix it. <execute_bash> exit </execute_bash>"}
    command = {"action": "run", "command": "ls", "thought": "Look."}
    listed = {"observation": "run", "content": "a", "command_id": 3, "exit_code": 0}
    cell = {"action": "run_ipython", "code": "1", "thought": ""}
    shown = {"observation": "run_ipython", "content": "1\n![image](data:image/png;base64,xyz)"}
    done = {"action": "finish", "thought": "Done.", "outputs": {}}
    null = {"observation": "null", "content": ""}
    flat = row(task, command, listed, cell, shown, done)
    pairs = row([task, null], [command, listed], [cell, shown], [done, null])
    assert said(flat) == [
        ("user", "prompt", task["content"]),
        ("assistant", "action", "Look.\n<execute_bash>\nls\n</execute_bash>"),
        ("user", "observation", "OBSERVATION:\na\n[Command 3 finished with exit code 0]"),
        ("assistant", "action", "<execute_ipython>\n1\n</execute_ipython>"),
        (
            "user",
            "observation",
            "OBSERVATION:\n1\n![image](data:image/png;base64, ...) already displayed to user",
        ),
        ("assistant", "action", "Done.\n<execute_bash>\nexit\n</execute_bash>"),
    ]
    assert said(pairs) == said(flat)
    assert openhands.recognises(pairs)
    assert read(flat).exit_status == "finish"


def test_old_messages_without_a_source_take_turns() -> None:
    def message(text: str) -> dict[str, str]:
        return {"action": "message", "content": text}

    record = row(message("task"), message("which file?"), message("a.py"), message("thanks"))
    assert [(role, text) for role, _, text in said(record)] == [
        ("user", "task"),
        ("assistant", "which file?"),
        ("user", "a.py"),
        ("assistant", "thanks"),
    ]


def test_the_prompt_decides_the_form_of_a_rebuilt_action() -> None:
    task = TASK | {"args": {"content": "Use <function=execute_bash> ..."}}
    command = {"source": "agent", "action": "run", "args": {"command": "ls", "thought": "Look."}}
    view = {"source": "agent", "action": "read", "args": {"path": "/a", "view_range": [1, 2]}}
    think = {"source": "agent", "action": "think", "args": {"thought": "Hm."}}
    listed = {"source": "agent", "observation": "run", "content": "a", "extras": {}}
    assert [text for _, _, text in said(row(task, command, listed, view, think))][1:] == [
        "Look.\n\n<function=execute_bash>\n<parameter=command>ls</parameter>\n</function>",
        "EXECUTION RESULT of [execute_bash]:\na",
        "<function=str_replace_editor>\n<parameter=command>view</parameter>\n"
        "<parameter=path>/a</parameter>\n<parameter=view_range>[1,2]</parameter>\n</function>",
        "<function=think>\n<parameter=thought>Hm.</parameter>\n</function>",
    ]


def test_the_resolvers_rows_name_an_issue() -> None:
    issue = {"owner": "neubig", "repo": "pr-viewer", "number": 5}
    record = row(TASK, {"action": "run", "command": "ls"}, issue=issue, git_patch="old diff")
    del record["instance_id"], record["metadata"], record["test_result"]
    trajectory = read(record | {"success": True})
    assert trajectory.instance_id == "neubig__pr-viewer-5"
    assert trajectory.trajectory_id.startswith("neubig__pr-viewer-5.")
    assert trajectory.patch == "old diff"
    assert trajectory.resolved is None  # `success` is a model's opinion.


@pytest.mark.parametrize(
    ("report", "resolved"),
    [({"resolved": True}, True), ({"resolved": False}, False), ({"resolved": "yes"}, None)],
)
def test_a_report_counts_only_where_it_is_a_bool(report: Any, resolved: bool | None) -> None:
    result = {"git_patch": "diff", "report": report}
    assert read(row(TASK, run("r", "a", ["a"]), test_result=result)).resolved is resolved


def test_a_run_without_an_action_must_say_how_it_failed() -> None:
    failed = read(row(SYSTEM, TASK, error="STATUS$ERROR\nTraceback ..."))
    assert (failed.num_steps, failed.exit_status) == (0, "STATUS$ERROR")
    unstarted = read(row(error="no runtime", instruction="the task"))
    assert [(m.role, m.kind, m.content) for m in unstarted.messages] == [
        ("user", "prompt", "the task")
    ]
    with pytest.raises(FormatError, match="no action"):
        read(row(SYSTEM, TASK, RECALL, RECALLED))
    with pytest.raises(FormatError, match="no action"):
        read(row(error="no runtime"))


@pytest.mark.parametrize(
    ("event", "reason"),
    [
        ("x", "event 1: expected an object, got str"),
        ({"id": 3}, "event 1: expected an action or an observation, got neither"),
        ({"action": 3}, "event 1: field 'action': expected str, got int"),
        ([TASK, 3], r"event 1\.1: expected an object, got int"),
        (run("r", "a", ["a"]) | {"args": 3}, "event 1: field 'args': expected dict, got int"),
        (
            {"source": "agent", "action": "run", "args": {"command": ["ls"]}},
            "event 1: field 'command': expected str, got list",
        ),
        (
            run("r", "a", ["a"]) | {"tool_call_metadata": {"model_response": {"choices": [1]}}},
            "event 1: choices: expected objects, got int",
        ),
    ],
)
def test_a_broken_event_says_where_and_what(event: Any, reason: str) -> None:
    with pytest.raises(FormatError, match=reason):
        read(row(TASK, event))


@pytest.mark.parametrize(
    "record",
    [
        [],
        {},
        [{"role": "user", "content": "x", "action": "ls"}],
        [{"action": "ls", "observation": "a", "response": "x"}],
        {"history": [{"role": "assistant", "content": "x", "action": "ls"}]},
        {"history": []},
        {"messages": [{"role": "user", "content": "x"}], "tools": []},
        {"messages": [{"role": "user", "content": "x"}], "run_id": None, "test_result": None},
        {"instance_id": "a", "model_patch": "diff", "model_name_or_path": "m"},
    ],
)
def test_other_records_are_not_claimed(record: Any) -> None:
    assert not openhands.recognises(record)
