"""Rows of nebius/SWE-agent-trajectories and nebius/SWE-rebench-openhands-trajectories.

Both keep their messages under `trajectory`. The first set has a form of its own: `text` for the
content, role `ai` for the model, the system prompt under `system_prompt`, the outcome under
`target`. The second, and nvidia/SWE-Zero-openhands-trajectories in its shape, has OpenAI's form.
"""

from typing import Any, Final

from srft_prep.errors import FormatError
from srft_prep.readers import Origin
from srft_prep.readers.conversation import conversation_of, named_by_content
from srft_prep.readers.fields import field, outcome_of, rows_of, tools_json
from srft_prep.types import Trajectory

_COLUMNS: Final = ("target", "generated_patch", "model_patch")
"""Columns of one of the sets that no other format has beside `trajectory`."""


def recognises(record: Any) -> bool:
    """Return whether a record is a row with a `trajectory` of messages."""
    if not isinstance(record, dict) or record.get("trajectory") is None:
        return False
    if any(key in record for key in _COLUMNS):
        return True
    rows = record["trajectory"]
    return isinstance(rows, list) and bool(rows) and isinstance(rows[0], dict) and "role" in rows[0]


def read(record: Any, *, origin: Origin) -> Trajectory:
    """Return the trajectory of a row.

    Raises:
        FormatError: a field has the wrong type, or the model wrote nothing.
    """
    if not isinstance(record, dict):
        raise FormatError(f"expected an object, got {type(record).__name__}")
    raws = [_openai_form(raw, number) for number, raw in enumerate(rows_of(record, "trajectory"))]
    outcome = "target" if record.get("target") is not None else "resolved"
    patch = "generated_patch" if record.get("generated_patch") is not None else "model_patch"
    trajectory = Trajectory(
        trajectory_id=field(record, "trajectory_id", str, where="record") or "",
        instance_id=field(record, "instance_id", str, where="record") or "",
        format="nebius",
        messages=conversation_of(raws),
        resolved=outcome_of(record, outcome, where="record"),
        model=field(record, "model_name", str, where="record"),
        exit_status=field(record, "exit_status", str, where="record"),
        patch=field(record, patch, str, where="record"),
        tools=tools_json(record.get("tools"), where="record"),
    )
    return named_by_content(trajectory, origin=origin)


def _openai_form(raw: Any, number: int) -> Any:
    """Return an entry of the first set as a message in OpenAI's form, others as they are.

    `mask` says which entries were trained on: an `ai` entry without it is a demonstration.
    """
    if not isinstance(raw, dict) or "content" in raw or not {"text", "system_prompt"} & raw.keys():
        return raw
    where = f"message {number}"
    role = field(raw, "role", str, where=where)
    text = field(raw, "text", str, where=where)
    prompt = field(raw, "system_prompt", str, where=where)
    return {
        "role": "assistant" if role == "ai" else role,
        "content": prompt if text is None else text,
        "is_demo": role == "ai" and field(raw, "mask", bool, where=where) is False,
    }
