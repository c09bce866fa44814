"""SWE-agent's .traj files: which text is the truth, and that no word of the model is lost."""

import json
from pathlib import Path

import pytest

from srft_prep.errors import FormatError
from srft_prep.readers import Origin, swe_agent
from srft_prep.types import Message, Trajectory

STEPS_UNLIKE_INDEX: dict[str, tuple[int, str]] = {}
"""File -> (steps read, why not INDEX's n_steps). Every file agrees today."""

EDITED_BY_HAND = {
    "katy.traj": "the author mended the thought of one answer in the history only",
    "i_got_id_demo.traj": "as katy.traj",
    "marshmallow-code__marshmallow-1867.traj": "function_calling_replace: two thoughts rewritten",
}
"""Demonstrations whose history holds another text than their steps; the history is read."""

ANYWHERE = Origin(path=Path("some_run/owner__repo-1/owner__repo-1.traj"))


def indexed(shared_data: Path) -> list[tuple[dict, Path]]:
    root = shared_data / "trajectories"
    lines = (root / "INDEX.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return [
        (row, root / row["source"] / row["path"])
        for row in rows
        if row["format"].startswith("sweagent")
    ]


def read_file(path: Path) -> Trajectory:
    return swe_agent.read(json.loads(path.read_text()), origin=Origin(path=path))


def find(shared_data: Path, part: str) -> Path:
    (path,) = [path for _, path in indexed(shared_data) if part in str(path)]
    return path


def answer(content: str, action: str = "ls", **more: object) -> dict:
    return {"role": "assistant", "content": content, "action": action, "agent": "main", **more}


def user(content: object, **more: object) -> dict:
    return {"role": "user", "content": content, "agent": "main", **more}


def step(response: str, action: str = "ls", observation: str = "", **more: object) -> dict:
    return {"response": response, "action": action, "observation": observation, **more}


def traj(history: list, steps: list, exit_status: str | None = "submitted") -> dict:
    info = {"exit_status": exit_status, "submission": "diff --git a/x b/x"}
    return {"environment": "main", "trajectory": steps, "history": history, "info": info}


def said(record: dict) -> list[tuple[str, str, str | None]]:
    messages = swe_agent.read(record, origin=ANYWHERE).messages
    return [(message.role, message.kind, message.content) for message in messages]


def test_every_file_has_the_steps_that_the_index_counts(shared_data: Path) -> None:
    files = indexed(shared_data)
    counts = {row["path"]: (read_file(path).num_steps, row["n_steps"]) for row, path in files}
    assert len(counts) == 25
    differing = {path: read for path, (read, counted) in counts.items() if read != counted}
    assert differing == {path: read for path, (read, _) in STEPS_UNLIKE_INDEX.items()}


def test_every_file_has_an_id_of_its_own(shared_data: Path) -> None:
    ids = [read_file(path).trajectory_id for _, path in indexed(shared_data)]
    assert len(set(ids)) == len(ids)


def test_every_answer_recorded_in_a_step_is_in_the_conversation(shared_data: Path) -> None:
    for _, path in indexed(shared_data):
        written = [message.content for message in read_file(path).messages]
        steps = json.loads(path.read_text()).get("trajectory", [])
        lost = [step["response"] for step in steps if step["response"] not in written]
        assert not lost or path.name in EDITED_BY_HAND, path


def test_the_history_holds_observations_that_the_steps_messages_omit(shared_data: Path) -> None:
    path = find(shared_data, "function_calling_replace_from_source")
    last = json.loads(path.read_text())["trajectory"][-1]["messages"]
    assert sum("Old environment output" in str(message["content"]) for message in last) == 8
    assert not any("Old environment output" in str(m.content) for m in read_file(path).messages)


def test_an_answer_missing_from_the_history_is_put_back_in_its_place(shared_data: Path) -> None:
    path = find(shared_data, "BabyEncryption")
    steps = json.loads(path.read_text())["trajectory"]
    trajectory = read_file(path)
    assert [step.action.content for step in trajectory.steps] == [s["response"] for s in steps]
    (observation,) = trajectory.steps[8].observations
    assert observation.content == steps[8]["observation"]


def test_a_missing_submit_comes_back_with_its_call(shared_data: Path) -> None:
    trajectory = read_file(find(shared_data, "6e44b9"))
    last = trajectory.steps[-1].action
    assert last.content is not None
    assert last.content.endswith("I will now submit the changes to finalize the fix.")
    assert last.tool_calls is not None
    assert json.loads(last.tool_calls)[0]["function"] == {"name": "submit", "arguments": "{}"}
    assert (trajectory.messages[-1].role, trajectory.messages[-1].kind) == ("tool", "artifact")


def test_demonstrations_are_no_steps(shared_data: Path) -> None:
    messages = read_file(find(shared_data, "pydicom__pydicom-1458")).messages
    assert [message.kind for message in messages[:4]] == ["prompt", "demo", "prompt", "action"]
    history = [user("task"), answer("shown", is_demo=True), user("output", is_demo=True)]
    history += [user("now you"), answer("mine")]
    assert [kind for _, kind, _ in said(traj(history, [], None))] == [
        "prompt",
        "demo",
        "demo",
        "prompt",
        "action",
    ]


@pytest.mark.parametrize(
    "text",
    [
        "Exit due to cost limit",
        "Exit due to context window",
        "exit due to retry error: RetryError[<Future at 0x7f>]",
        "Exit due to unknown error: boom\nsecond line",
        "Exiting due to forfeit",
        "Exit due to cost limit\n\n```\n\n```",
    ],
)
def test_what_the_harness_says_in_the_models_place_is_no_action(text: str) -> None:
    history = [user("task"), answer("look"), user("x"), answer(text, ""), user("Exited")]
    steps = [step("look"), step(text, "")]
    assert [kind for _, kind, _ in said(traj(history, steps, "submitted (exit_cost)"))] == [
        "prompt",
        "action",
        "observation",
        "artifact",
        "artifact",
    ]


@pytest.mark.parametrize(
    "text", ["Exit due to cost limits", "I saw: Exit due to cost limit", "Exit due to an error"]
)
def test_a_model_may_write_about_exits(text: str) -> None:
    assert said(traj([user("task"), answer(text)], [step(text)]))[-1][1] == "action"


def test_the_last_message_of_a_finished_run_is_no_observation() -> None:
    history = [user("task"), answer("done", "submit"), user("diff --git a/x b/x")]
    assert said(traj(history, [step("done", "submit")]))[-1][1] == "artifact"
    history = [user("task"), answer("look"), user("a file")]
    assert said(traj(history, [step("look")], exit_status=None))[-1][1] == "observation"
    assert said({"history": [*history, answer("", "submit"), user("diff")]})[-1][1] == "artifact"


def test_answers_that_had_to_be_written_again_stand_with_the_harness_errors() -> None:
    start = [user("task")]
    again = [answer("bad 1"), user("Your output was not formatted correctly")]
    twice = [answer("bad 2"), user("Still wrong")]
    steps = [
        step("bad 1", "", query=start),
        step("bad 2", "", query=[*start, *again]),
        step("good", query=[*start, *twice]),
        step("end", "submit", query=[*start, answer("good"), user("output")]),
    ]
    history = [*start, answer("good"), user("output"), answer("end", "submit"), user("diff")]
    assert said(traj(history, steps)) == [
        ("user", "prompt", "task"),
        ("assistant", "action", "bad 1"),
        ("user", "observation", "Your output was not formatted correctly"),
        ("assistant", "action", "bad 2"),
        ("user", "observation", "Still wrong"),
        ("assistant", "action", "good"),
        ("user", "observation", "output"),
        ("assistant", "action", "end"),
        ("user", "artifact", "diff"),
    ]


@pytest.mark.parametrize("view", ["messages", "query"])
def test_the_last_step_stands_in_for_a_missing_history(view: str) -> None:
    before = [user("task"), answer("look"), user("a file")]
    seen = [*before, answer("end", "submit")] if view == "messages" else before
    steps = [step("look", observation="a file"), step("end", "submit", **{view: seen})]
    assert [content for _, kind, content in said(traj([], steps)) if kind == "action"] == [
        "look",
        "end",
    ]


def test_a_step_without_words_leaves_no_empty_action() -> None:
    history = [user("task"), answer("", "ls", tool_calls=[call("bash", '{"command":"ls"}')])]
    record = traj(history, [step("", ""), step("", "ls")], exit_status=None)
    trajectory = swe_agent.read(record, origin=ANYWHERE)
    assert trajectory.num_steps == 1
    assert trajectory.steps[0].action.content == ""


def call(name: str, arguments: object) -> dict:
    return {"id": "call_1", "type": "function", "function": {"name": name, "arguments": arguments}}


def test_tool_messages_keep_ids_calls_and_thoughts() -> None:
    blocks = [{"type": "thinking", "thinking": "hm", "signature": "s"}, {"type": "redacted"}]
    calls = [call("bash", '{"command": "ls"}')]
    history = [
        user([{"type": "text", "text": " task\n"}]),
        answer("", tool_calls=calls, thinking_blocks=blocks),
        {"role": "tool", "content": "a", "tool_call_ids": ["call_1"]},
    ]
    messages = swe_agent.read(traj(history, [step("")], None), origin=ANYWHERE).messages
    assert messages == (
        Message(role="user", kind="prompt", content=" task\n"),
        Message(
            role="assistant",
            kind="action",
            content="",
            reasoning_content="hm",
            tool_calls=json.dumps(calls, separators=(",", ":")),
        ),
        Message(role="tool", kind="observation", content="a", tool_call_id="call_1"),
    )


@pytest.mark.parametrize(
    ("path", "line", "expected"),
    [
        ("runs/r1/a__b-1/a__b-1.traj", None, ("r1/a__b-1", "a__b-1")),
        ("runs/r1/a__b-1.traj", None, ("r1/a__b-1", "a__b-1")),
        ("runs/r1/a__b.1c.pr_2/a__b.1c.pr_2.traj.gz", None, ("r1/a__b.1c.pr_2", "a__b.1c.pr_2")),
        ("runs/r1/all.jsonl", 7, ("r1/all:7", "all")),
    ],
)
def test_ids_come_from_the_instance_and_the_run_folder(
    path: str, line: int | None, expected: tuple[str, str]
) -> None:
    record = traj([user("task"), answer("look")], [step("look")])
    trajectory = swe_agent.read(record, origin=Origin(path=Path(path), line=line))
    assert (trajectory.trajectory_id, trajectory.instance_id) == expected


def test_model_instance_and_patch_come_from_where_the_version_keeps_them() -> None:
    record = traj([user("task"), answer("look")], [step("look")])
    record["environment"] = "x__y-2"
    config = {"agent": {"model": {"name": "m"}}}
    for replay in (config, json.dumps(config)):
        trajectory = swe_agent.read(record | {"replay_config": replay}, origin=ANYWHERE)
        assert (trajectory.model, trajectory.instance_id) == ("m", "x__y-2")
        assert (trajectory.patch, trajectory.exit_status) == ("diff --git a/x b/x", "submitted")
    old = Origin(path=Path("gpt4__dev__default__t-0.00__p-0.95__c-3.00__install-1/x__y-2.traj"))
    assert swe_agent.read(record, origin=old).model == "gpt4"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"history": 3}, "record: field 'history': expected list, got int"),
        ({"history": [{"content": "x"}]}, "message 0: no role"),
        ({"history": [user({"a": 1})]}, "message 0: content: expected a string or a list"),
        ({"history": [answer("x", tool_calls="y")]}, "message 0: tool_calls: expected a list"),
        ({"history": [user("x")], "trajectory": []}, "no action by a model among 1 messages"),
        ({"trajectory": [4]}, "step 0: expected an object, got int"),
        ({"history": [], "trajectory": [{"response": 1}]}, "step 0: content: expected a string"),
        ({"info": "x"}, "record: field 'info': expected dict, got str"),
        ({"replay_config": "{"}, "replay_config: expected JSON text"),
    ],
)
def test_a_broken_record_is_rejected_with_a_sentence(change: dict, sentence: str) -> None:
    good = traj([user("task"), answer("look")], [step("look")])
    with pytest.raises(FormatError) as caught:
        swe_agent.read(good | change, origin=ANYWHERE)
    assert sentence in str(caught.value)
