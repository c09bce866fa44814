"""Rows of SWE-bench/SWE-smith-trajectories and of the data sets in its shape.

A row has `messages` (a list, or JSON text of one) and names its task or itself (`instance_id`,
`traj_id`, `trajectory_id`). The three styles differ in how a call is written: as text in the
content (xml, ticks) or as `tool_calls` (tool). Relatives: the `ft_xml*.jsonl` that SWE-smith's
converter writes, mini-coder, Open-SWE-Traces, CoderForge.
"""

from typing import Any, Final

from srft_prep.errors import FormatError
from srft_prep.readers import Origin
from srft_prep.readers.conversation import conversation_of, ended, named_by_content
from srft_prep.readers.fields import first_text, outcome_of, rows_of, tools_json
from srft_prep.types import Message, Trajectory

_NAMES: Final = ("instance_id", "traj_id", "trajectory_id")
_FOREIGN: Final = (
    "history",
    "info",
    "run_id",
    "test_result",
    "trajectory",
    "trajectory_format",
)
"""Fields that only other formats have."""

INVENTED_SUBMIT: Final = (
    "Since we have successfully fixed the issue and verified it works, let's submit the changes:"
    "\n\n<function=submit>\n</function>"
)
"""What SWE-smith's converter puts in place of "Exit due to cost limit" (xml style)."""


def recognises(record: Any) -> bool:
    """Return whether a record is a row with messages and a name, and of no other format."""
    return (
        isinstance(record, dict)
        and record.get("messages") is not None
        and any(isinstance(record.get(key), str) for key in _NAMES)
        and all(record.get(key) is None for key in _FOREIGN)
    )


def read(record: Any, *, origin: Origin) -> Trajectory:
    """Return the trajectory of a row.

    Raises:
        FormatError: a field has the wrong type, or the model wrote nothing.
    """
    if not isinstance(record, dict):
        raise FormatError(f"expected an object, got {type(record).__name__}")
    patch = first_text(record, "patch", "model_patch")
    messages = conversation_of(rows_of(record, "messages"), not_the_model=INVENTED_SUBMIT)
    if patch and patch.strip() and _shows(messages[-1], patch.strip()):
        messages = ended(messages)
    outcome = "resolved" if record.get("resolved") is not None else "verified"
    trajectory = Trajectory(
        trajectory_id=first_text(record, "traj_id", "trajectory_id") or "",
        instance_id=first_text(record, "instance_id") or "",
        format="swe-smith",
        messages=messages,
        resolved=outcome_of(record, outcome, where="record"),
        model=first_text(record, "model", "model_name"),
        exit_status=first_text(record, "exit_status", "finish_reason"),
        patch=patch,
        tools=tools_json(record.get("tools"), where="record"),
    )
    return named_by_content(trajectory, origin=origin)


def _shows(message: Message, patch: str) -> bool:
    """Return whether a message is a harness's last word: the submitted diff."""
    return message.kind == "observation" and patch in (message.content or "")
