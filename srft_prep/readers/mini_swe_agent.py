"""mini-swe-agent's `.traj.json` files, v1 and v2, and rows of data sets in their shape.

Very old files are a bare list of messages. v1 (`mini-swe-agent-1`) writes actions as a code block
in the text, and observations are user messages; when a run ends, the harness adds one more user
message that holds the submission. v2 (`mini-swe-agent-1.1`) has tool calls, and the harness's last
message has a role of its own, `exit`. No model read either of these last messages: both are
artifacts. `extra` repeats text and raw API answers, and is dropped; it also marks the user messages
that report a format error, which are observations like any other.

A run that failed before its first action (a provider that timed out, say) is a true run with no
step: it is taken when the record says how it failed.
"""

from typing import Any, Final

from srft_prep.errors import FormatError
from srft_prep.readers import Origin
from srft_prep.readers.conversation import chat_message, conversation_of, named_by_content
from srft_prep.readers.fields import field, outcome_of, rows_of, tools_json
from srft_prep.types import Message, Trajectory

_SUBMITTED: Final = "Submitted"
"""The exit status of a run whose agent gave in its work."""

_FINAL_OUTPUT: Final = "_FINAL_OUTPUT"
"""End of the word that ends a run, in all its versions: MICRO_SWE_AGENT_FINAL_OUTPUT up to
COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT."""

_SHELVES: Final = ("trajs", "trajectories")
"""Names of folders that hold a run's trajectories and do not name the run."""


def recognises(record: Any) -> bool:
    """Return whether a record is a mini-swe-agent file or row, or a bare list of messages."""
    if isinstance(record, list):
        return bool(record) and all(_is_bare_message(raw) for raw in record[:3])
    if not isinstance(record, dict) or record.get("messages") is None:
        return False
    version, info = record.get("trajectory_format"), record.get("info")
    if isinstance(version, str):
        return version.startswith("mini-swe-agent")
    return isinstance(info, dict) and "mini_version" in info


def read(record: Any, *, origin: Origin) -> Trajectory:
    """Return the trajectory of a file or row.

    Raises:
        FormatError: a field has the wrong type, or there is no action and no error to explain it.
    """
    record = {"messages": record} if isinstance(record, list) else record
    if not isinstance(record, dict):
        raise FormatError(f"expected an object or a list, got {type(record).__name__}")
    info = field(record, "info", dict, where="record") or {}
    exit_status = field(info, "exit_status", str, where="info")
    if exit_status is None:
        exit_status = field(record, "exit_status", str, where="record")
    submission = field(info, "submission", str, where="info")
    raws = rows_of(record, "messages")
    messages = _messages(raws, exit_status=exit_status, submission=submission)
    instance_id = _instance_id(record, origin=origin)
    trajectory = Trajectory(
        trajectory_id=_trajectory_id(record, instance_id, origin=origin),
        instance_id=instance_id,
        format="mini-swe-agent",
        messages=messages,
        resolved=outcome_of(record, "resolved", where="record"),
        model=_model(record, info),
        exit_status=exit_status,
        # When a run fails, v1 keeps the error's text under `submission`.
        patch=submission if exit_status in (None, _SUBMITTED) else None,
        tools=tools_json(record.get("tools"), where="record"),
    )
    return named_by_content(trajectory, origin=origin)


def _messages(
    raws: list[Any], *, exit_status: str | None, submission: str | None
) -> tuple[Message, ...]:
    failed = bool(raws) and exit_status not in (None, _SUBMITTED)
    if failed and not any(isinstance(raw, dict) and raw.get("role") == "assistant" for raw in raws):
        messages = tuple(
            chat_message(raw, kind="prompt", where=f"message {number}")
            for number, raw in enumerate(raws)
        )
    else:
        messages = conversation_of(raws)
        if _ends_with_submission(messages, exit_status=exit_status, submission=submission):
            messages = (*messages[:-1], messages[-1]._replace(kind="artifact"))
    return tuple(
        message._replace(kind="artifact") if message.role == "exit" else message
        for message in messages
    )


def _ends_with_submission(
    messages: tuple[Message, ...], *, exit_status: str | None, submission: str | None
) -> bool:
    """Return whether the last message is what v1 adds after the run: its result."""
    last = messages[-1]
    if last.role != "user" or last.kind != "observation":
        return False
    if exit_status is not None:
        return exit_status == _SUBMITTED or last.content == submission
    action = [message for message in messages if message.kind == "action"][-1]
    return _FINAL_OUTPUT in (action.content or "")


def _instance_id(record: dict[str, Any], *, origin: Origin) -> str:
    name: str | None = field(record, "instance_id", str, where="record")
    if name is not None:
        return name
    if origin.line is not None:
        return ""
    return origin.path.name.removesuffix(".json").removesuffix(".traj")


def _trajectory_id(record: dict[str, Any], instance_id: str, *, origin: Origin) -> str:
    """Return the record's own id, or `<run folder>/<instance>` for a file; else nothing."""
    for key in ("traj_id", "trajectory_id"):
        own: str | None = field(record, key, str, where="record")
        if own:
            return own
    if origin.line is not None or not instance_id:
        return ""
    folder = origin.path.absolute().parent
    if folder.name == instance_id:
        folder = folder.parent
    if folder.name in _SHELVES:
        folder = folder.parent
    return f"{folder.name}/{instance_id}" if folder.name else instance_id


def _model(record: dict[str, Any], info: dict[str, Any]) -> str | None:
    config = field(info, "config", dict, where="info") or {}
    settings = field(config, "model", dict, where="info.config") or {}
    name: str | None = field(settings, "model_name", str, where="info.config.model")
    return name if name is not None else field(record, "model", str, where="record")


def _is_bare_message(raw: Any) -> bool:
    return isinstance(raw, dict) and isinstance(raw.get("role"), str) and "content" in raw
