"""nebius's two sets: a form of its own, and OpenAI's form under `trajectory`."""

import json
from pathlib import Path
from typing import Any

import pytest

from srft_prep.errors import FormatError
from srft_prep.readers import Origin, nebius, swe_agent
from srft_prep.types import Trajectory

STEPS_UNLIKE_INDEX: dict[str, tuple[int, str]] = {}
"""File -> (steps read, why not INDEX's n_steps). The one file agrees today."""

ANYWHERE = Origin(path=Path("train.parquet"), line=1)


def entry(role: str, text: str | None, *, mask: bool | None, prompt: str | None = None) -> Any:
    row = {"cutoff_date": None, "mask": mask, "role": role, "system_prompt": prompt, "text": text}
    return row | {"cutoff_date": "01.01.2023"} if prompt else row


SYSTEM = entry("system", None, mask=False, prompt="SETTING: a shell")
TASK = entry("user", "the task", mask=False)
LOOK = entry("ai", "look\n```\nls\n```", mask=True)


def first_set(*entries: Any, **more: Any) -> dict[str, Any]:
    record = {
        "instance_id": "owner__repo-1",
        "model_name": "swe-agent-llama-70b",
        "target": True,
        "trajectory": list(entries),
        "exit_status": "submitted",
        "generated_patch": "\ndiff",
        "eval_logs": "...",
    }
    return record | more


def second_set(arguments: Any, **more: Any) -> dict[str, Any]:
    nothing = {"name": None, "tool_call_id": None, "tool_calls": None}
    call = {
        "function": {"name": "execute_bash", "arguments": arguments},
        "id": "call_1",
        "type": "function",
        "index": None,
    }
    record = {
        "trajectory_id": "chatcmpl-1",
        "instance_id": "owner__repo-1",
        "repo": "owner/repo",
        "trajectory": [
            {"role": "system", "content": "You are OpenHands agent"} | nothing,
            {"role": "user", "content": "the task"} | nothing,
            {"role": "assistant", "content": None} | nothing | {"tool_calls": [call]},
            {"role": "tool", "content": "a", "name": "execute_bash", "tool_call_id": "call_1"},
            {"role": "assistant", "content": "done"} | nothing,
        ],
        "tools": [{"type": "function", "function": {"name": "execute_bash", "strict": None}}],
        "model_patch": "diff",
        "exit_status": "submit",
        "resolved": 1,
        "gen_tests_correct": None,
    }
    return record | more


def read(record: Any) -> Trajectory:
    return nebius.read(record, origin=ANYWHERE)


def test_the_sample_has_the_steps_that_the_index_counts(shared_data: Path) -> None:
    root = shared_data / "trajectories"
    entries = map(json.loads, (root / "INDEX.jsonl").read_text().splitlines())
    differing = {}
    for row in entries:
        if row["format"] == "adp-raw:nebius_SWE-agent-trajectories":
            records = json.loads((root / row["source"] / row["path"]).read_text())
            trajectories = [read(record) for record in records]
            assert len({trajectory.trajectory_id for trajectory in trajectories}) == row["n_traj"]
            steps = sum(trajectory.num_steps for trajectory in trajectories)
            if steps != row["n_steps"]:
                differing[row["path"]] = steps
    assert differing == {path: steps for path, (steps, _) in STEPS_UNLIKE_INDEX.items()}


def test_the_first_set_is_put_into_openais_form() -> None:
    trajectory = read(first_set(SYSTEM, TASK, LOOK, entry("user", " a\n", mask=False)))
    assert [(m.role, m.kind, m.content) for m in trajectory.messages] == [
        ("system", "prompt", "SETTING: a shell"),
        ("user", "prompt", "the task"),
        ("assistant", "action", "look\n```\nls\n```"),
        ("user", "observation", " a\n"),
    ]
    assert (trajectory.resolved, trajectory.model) == (True, "swe-agent-llama-70b")
    assert (trajectory.patch, trajectory.exit_status) == ("\ndiff", "submitted")
    assert trajectory.trajectory_id.startswith("owner__repo-1.")


def test_an_entry_of_the_model_without_its_mask_is_a_demonstration() -> None:
    shown = entry("ai", "shown", mask=False)
    kinds = [message.kind for message in read(first_set(SYSTEM, shown, TASK, LOOK)).messages]
    assert kinds == ["prompt", "demo", "prompt", "action"]
    with pytest.raises(FormatError, match="no action"):
        read(first_set(SYSTEM, TASK, shown))


def test_a_mask_that_was_not_recorded_hides_nothing() -> None:
    assert read(first_set(TASK, entry("ai", "look", mask=None))).num_steps == 1


def test_an_exit_of_the_harness_is_an_artifact() -> None:
    over = entry("ai", "Exit due to context window", mask=True)
    assert read(first_set(TASK, LOOK, over)).messages[-1].kind == "artifact"


@pytest.mark.parametrize("arguments", [{"command": "ls"}, '{"command":"ls"}'])
def test_arguments_are_always_json_text(arguments: Any) -> None:
    trajectory = read(second_set(arguments))
    action, answer = (step.action for step in trajectory.steps)
    assert json.loads(action.tool_calls or "") == [
        {
            "function": {"name": "execute_bash", "arguments": '{"command":"ls"}'},
            "id": "call_1",
            "type": "function",
        }
    ]
    assert (action.content, answer.content) == (None, "done")
    observation = trajectory.steps[0].observations[0]
    assert (observation.role, observation.tool_call_id) == ("tool", "call_1")
    assert trajectory.tools == '[{"type":"function","function":{"name":"execute_bash"}}]'


def test_the_second_set_keeps_its_ids_and_outcome() -> None:
    trajectory = read(second_set("{}", resolved=0))
    assert (trajectory.trajectory_id, trajectory.resolved) == ("chatcmpl-1", False)
    assert (trajectory.patch, trajectory.exit_status) == ("diff", "submit")


def test_a_row_of_the_zero_set_has_no_outcome() -> None:
    record = second_set("{}")
    del record["resolved"], record["exit_status"], record["tools"]
    assert nebius.recognises(record)
    assert read(record).resolved is None


def test_a_traj_file_is_not_nebiuss() -> None:
    steps = [{"action": "ls", "observation": "", "response": "look", "thought": ""}]
    record = {"trajectory": steps, "history": [], "info": {}}
    assert not nebius.recognises(record)
    assert not swe_agent.recognises(first_set(TASK, LOOK))
    assert not swe_agent.recognises(second_set("{}"))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"trajectory": 3}, "field 'trajectory': expected a list or JSON text of one, got int"),
        ({"trajectory": [TASK, 3]}, "message 1: expected an object, got int"),
        ({"trajectory": [TASK, {"text": "x"}]}, "message 1: no role"),
        ({"trajectory": [{"role": "ai", "text": 3}]}, "message 0: field 'text': expected str"),
        ({"trajectory": [LOOK | {"mask": 1}]}, "message 0: field 'mask': expected bool, got int"),
        ({"trajectory": []}, "no action by a model among 0 messages"),
        ({"target": "yes"}, "field 'target': expected a bool, 0, 1 or -1, got 'yes'"),
    ],
)
def test_a_broken_row_is_rejected_with_a_sentence(change: dict[str, Any], sentence: str) -> None:
    assert nebius.recognises(first_set(TASK, LOOK) | change)
    with pytest.raises(FormatError) as caught:
        read(first_set(TASK, LOOK) | change)
    assert sentence in str(caught.value)
