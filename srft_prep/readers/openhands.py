"""OpenHands V0: rows of evaluation's `output.jsonl`, lists of events, and SWE-Gym's rows.

A row of `output.jsonl` holds its run under `history`: a flat list of events, old pairs
`[action, observation]`, or the resolver's events without id and source. A list of events is one
run. Rows of SWE-Gym/OpenHands-Sampled-Trajectories hold `messages` in OpenAI's form, every key
present and null when unused, beside `run_id`, `tools` and `test_result`.

`openhands_events` says what of a run becomes a message, and what is left out.

The outcome is not in these files but in SWE-Gym's rows; `success` in the resolver's is a model's
opinion and is not read. A run that ended in an error before its first action is a true run with no
step, and is taken.
"""

from typing import Any, Final

import orjson

from srft_prep.errors import FormatError
from srft_prep.readers import Origin
from srft_prep.readers.conversation import conversation_of, named_by_content
from srft_prep.readers.fields import field, outcome_of, rows_of, tools_json
from srft_prep.readers.openhands_events import conversation_of_events, is_event
from srft_prep.types import Message, Trajectory

_STATUS_CHARS: Final = 200
"""Longest exit status that is taken from an error's first line."""

_OF_ROWS: Final = ("test_result", "metadata", "git_patch")
"""Columns of a row of `output.jsonl`; one of them tells it from other records with a history."""


def recognises(record: Any) -> bool:
    """Return whether a record is a row or a list of events. Predictions files are neither."""
    if isinstance(record, list):
        return bool(record) and all(is_event(event) for event in record[:2])
    if not isinstance(record, dict):
        return False
    history = record.get("history")
    if isinstance(history, list):
        return is_event(history[0]) if history else any(key in record for key in _OF_ROWS)
    beside = ("run_id", "test_result")
    return record.get("messages") is not None and any(record.get(key) for key in beside)


def read(record: Any, *, origin: Origin) -> Trajectory:
    """Return the trajectory of a row or of a list of events.

    Raises:
        FormatError: a field has the wrong type, or there is no action and no error to explain it.
    """
    record = {"history": record} if isinstance(record, list) else record
    if not isinstance(record, dict):
        raise FormatError(f"expected an object or a list, got {type(record).__name__}")
    if record.get("history") is None:
        return named_by_content(_of_messages(record), origin=origin)
    return named_by_content(_of_events(record), origin=origin)


def _of_events(record: dict[str, Any]) -> Trajectory:
    history = field(record, "history", list, where="record")
    metadata = field(record, "metadata", dict, where="record") or {}
    config = field(metadata, "llm_config", dict, where="metadata") or {}
    max_chars = field(config, "max_message_chars", int, where="metadata.llm_config")
    error = _error(record)
    conversation = conversation_of_events(history, max_chars=max_chars)
    if not conversation.messages:
        instruction = field(record, "instruction", str, where="record")
        if not instruction:
            raise FormatError(f"no action, no message and no instruction: {len(history)} events")
        conversation.add(role="user", content=instruction)
    if conversation.last_action is None and not error:
        raise FormatError(f"no action by the agent, and no error, among {len(history)} events")
    instance_id = _instance_id(record)
    folder = field(metadata, "eval_output_dir", str, where="metadata") or ""
    model: str | None = field(config, "model", str, where="metadata.llm_config")
    return Trajectory(
        trajectory_id=_joined(folder.rstrip("/").rpartition("/")[2], instance_id),
        instance_id=instance_id,
        format="openhands",
        messages=tuple(conversation.messages),
        resolved=_outcome(record),
        model=model or conversation.model,
        exit_status=error or ("finish" if conversation.last_action == "finish" else None),
        patch=_patch(record),
        tools=conversation.tools or tools_json(record.get("tools"), where="record"),
    )


def _of_messages(record: dict[str, Any]) -> Trajectory:
    instance_id = _instance_id(record)
    messages = conversation_of(rows_of(record, "messages"))
    run_id = field(record, "run_id", str, where="record") or ""
    return Trajectory(
        trajectory_id=_joined(run_id, instance_id),
        instance_id=instance_id,
        format="openhands",
        messages=messages,
        resolved=_outcome(record),
        model=field(record, "model", str, where="record"),
        exit_status=_error(record) or ("finish" if _finishes(messages) else None),
        patch=_patch(record),
        tools=tools_json(record.get("tools"), where="record"),
    )


def _instance_id(record: dict[str, Any]) -> str:
    """Return the task's name; the resolver's rows name an issue instead."""
    name: str | None = field(record, "instance_id", str, where="record")
    if name is not None:
        return name
    issue = field(record, "issue", dict, where="record") or {}
    owner = field(issue, "owner", str, where="issue")
    repo = field(issue, "repo", str, where="issue")
    number = field(issue, "number", int, where="issue")
    return f"{owner}__{repo}-{number}" if owner and repo and number is not None else ""


def _joined(run: str, instance_id: str) -> str:
    return f"{run}/{instance_id}" if run and instance_id else ""


def _outcome(record: dict[str, Any]) -> bool | None:
    outcome = outcome_of(record, "resolved", where="record")
    report = (field(record, "test_result", dict, where="record") or {}).get("report")
    reported = report.get("resolved") if isinstance(report, dict) else None
    return reported if outcome is None and isinstance(reported, bool) else outcome


def _patch(record: dict[str, Any]) -> str | None:
    result = field(record, "test_result", dict, where="record") or {}
    patch: str | None = field(result, "git_patch", str, where="test_result")
    return patch if patch is not None else field(record, "git_patch", str, where="record")


def _error(record: dict[str, Any]) -> str | None:
    """Return the first line of the error that ended the run."""
    error = field(record, "error", str, where="record") or ""
    return error.strip().partition("\n")[0][:_STATUS_CHARS] or None


def _finishes(messages: tuple[Message, ...]) -> bool:
    last = [message for message in messages if message.kind == "action"][-1]
    calls = orjson.loads(last.tool_calls) if last.tool_calls else []
    return any(call["function"]["name"] == "finish" for call in calls)
