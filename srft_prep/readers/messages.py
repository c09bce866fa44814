"""Plain chat rows, the last resort: `{"messages": [...]}` or ShareGPT's `{"conversations": [...]}`.

Both columns may hold JSON text instead of a list. SWE-Play's rows are of this kind. ShareGPT's
`from` becomes a role and its `value` the content, as it is: a `function_call` is text that the
model wrote, and its form is the data set's own.
"""

from typing import Any, Final

import orjson

from srft_prep.errors import FormatError
from srft_prep.readers import Origin
from srft_prep.readers.conversation import conversation_of, named_by_content
from srft_prep.readers.fields import field, first_text, outcome_of, rows_of, tools_json
from srft_prep.types import Trajectory

_COLUMNS: Final = ("messages", "conversations")

_ROLE_OF: Final = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
}
"""ShareGPT's speakers."""


def recognises(record: Any) -> bool:
    """Return whether a record has a column of messages.

    A log of one model call (OpenHands' `llm_completions`) has one too, but it is a piece of a run:
    the next call's log repeats it, and its own last answer is elsewhere in the record.
    """
    if not isinstance(record, dict) or {"response", "kwargs"} <= record.keys():
        return False
    return any(_holds_messages(record.get(column)) for column in _COLUMNS)


def read(record: Any, *, origin: Origin) -> Trajectory:
    """Return the trajectory of a row.

    Raises:
        FormatError: a field has the wrong type, or the model wrote nothing.
    """
    if not isinstance(record, dict):
        raise FormatError(f"expected an object, got {type(record).__name__}")
    column = _COLUMNS[0] if record.get(_COLUMNS[0]) is not None else _COLUMNS[1]
    rows = rows_of(record, column)
    raws = [_openai_form(raw, where=f"message {number}") for number, raw in enumerate(rows)]
    if column == "conversations" and isinstance(record.get("system"), str):
        raws.insert(0, {"role": "system", "content": record["system"]})
    trajectory = Trajectory(
        trajectory_id=_name(record, "trajectory_id", "traj_id", "id") or "",
        instance_id=_name(record, "instance_id") or "",
        format="messages",
        messages=conversation_of(raws),
        resolved=outcome_of(record, "resolved", where="record"),
        model=first_text(record, "model", "model_name"),
        exit_status=first_text(record, "exit_status", "finish_reason"),
        patch=first_text(record, "patch", "model_patch"),
        tools=tools_json(record.get("tools"), where="record"),
    )
    return named_by_content(trajectory, origin=origin)


def _holds_messages(column: Any) -> bool:
    if isinstance(column, str):
        try:
            column = orjson.loads(column)
        except orjson.JSONDecodeError:
            return False
    first = column[0] if isinstance(column, list) and column else None
    first = first[0] if isinstance(first, list) and len(first) == 1 else first
    return isinstance(first, dict) and ("role" in first or "from" in first)


def _openai_form(raw: Any, *, where: str) -> Any:
    """Return a message of ShareGPT's form in OpenAI's, another as it is."""
    if not isinstance(raw, dict) or "role" in raw or "from" not in raw:
        return raw
    speaker = field(raw, "from", str, where=where)
    if speaker not in _ROLE_OF:
        raise FormatError(
            f"{where}: field 'from': expected one of {', '.join(_ROLE_OF)}, got {speaker!r}"
        )
    return {"role": _ROLE_OF[speaker], "content": raw.get("value")}


def _name(record: dict[str, Any], *keys: str) -> str | None:
    """Return the first of the ids that is there; some data sets number their rows."""
    for key in keys:
        value = record.get(key)
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        name: str | None = field(record, key, str, where="record")
        if name is not None:
            return name
    return None
