"""Raw messages -> messages with their kinds: what all readers of role-based formats share."""

import re
from dataclasses import replace
from typing import Any, Final

from srft_prep.errors import FormatError
from srft_prep.readers import Origin
from srft_prep.readers.fields import calls_json, dump, field, text_of
from srft_prep.types import Kind, Message, Trajectory

_HARNESS_EXIT: Final = re.compile(
    r"(?:[Ee]xit due to (?:cost limit|context window|total execution time exceeded"
    r"|multiple consecutive command timeouts|repeated format/blocklist/bash syntax errors"
    r"|(?:retry|environment|runtime|unknown) error: .*)"
    r"|Exiting due to forfeit)"
    r"(?:\s*```\s*```)?",
    re.DOTALL,
)
"""What SWE-agent writes in the model's place when it gives up (`sweagent/agent/agents.py`).

The empty code block is what SWE-smith's ticks style adds to it.
"""


def conversation_of(raws: list[Any], *, not_the_model: str | None = None) -> tuple[Message, ...]:
    """Return raw messages with their kinds: what the model wrote is an action.

    `is_demo` marks a demonstration. What the harness wrote in the model's place, and the answers to
    it, are artifacts; `not_the_model` is one more such text. Messages wrapped in lists of one are
    unwrapped, and arguments that are no text become JSON text.

    Raises:
        FormatError: a message is broken, or none is an action.
    """
    messages: list[Message] = []
    after: Kind = "prompt"
    for number, wrapped in enumerate(raws):
        where = f"message {number}"
        raw = wrapped[0] if isinstance(wrapped, list) and len(wrapped) == 1 else wrapped
        message = _message(raw, where=where)
        kind = after
        if field(raw, "is_demo", bool, where=where):
            kind = "demo"
        elif message.role == "assistant":
            kind = "artifact" if _by_harness(message, not_the_model=not_the_model) else "action"
            after = "artifact" if kind == "artifact" else "observation"
        messages.append(message._replace(kind=kind))
    if not any(message.kind == "action" for message in messages):
        raise FormatError(f"no action by a model among {len(messages)} messages")
    return tuple(messages)


def ended(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """Return the messages of a finished run: those after the last answer become artifacts.

    They are the harness's last words (the submitted diff, say), and no model read them.
    """
    last = max(i for i, message in enumerate(messages) if message.role == "assistant")
    tail = (message._replace(kind="artifact") for message in messages[last + 1 :])
    return (*messages[: last + 1], *tail)


def named_by_content(trajectory: Trajectory, *, origin: Origin) -> Trajectory:
    """Return the trajectory with an id: its own, or its task's name and a hash of its content.

    A row without an id may be one of many attempts at its task; the hash keeps them apart wherever
    the row is found.

    Raises:
        FormatError: the text has a character that cannot be written in UTF-8.
    """
    if trajectory.trajectory_id:
        return trajectory
    try:
        suffix = trajectory.content_hash[:8]
    except TypeError as error:
        raise FormatError(f"messages cannot be written as JSON: {error}") from None
    name = trajectory.instance_id or origin.path.stem
    return replace(trajectory, trajectory_id=f"{name}.{suffix}")


def chat_message(raw: Any, *, kind: Kind, where: str, role: str | None = None) -> Message:
    """Return the Message of a dict in OpenAI's form; `role` overrides the dict's own.

    `tool_call_ids` (a list, SWE-agent's spelling) is accepted beside `tool_call_id`.

    Raises:
        FormatError: no dict, no role, or a field of the wrong type.
    """
    if not isinstance(raw, dict):
        raise FormatError(f"{where}: expected an object, got {type(raw).__name__}")
    role = role or field(raw, "role", str, where=where)
    if not role:
        raise FormatError(f"{where}: no role")
    call_ids = field(raw, "tool_call_ids", list, where=where)
    call_id = field(raw, "tool_call_id", str, where=where)
    if call_id is None and call_ids and isinstance(call_ids[0], str):
        call_id = call_ids[0]
    return Message(
        role=role,
        kind=kind,
        content=text_of(raw.get("content"), where=where),
        reasoning_content=field(raw, "reasoning_content", str, where=where) or None,
        tool_calls=calls_json(raw.get("tool_calls"), where=where),
        tool_call_id=call_id,
        name=field(raw, "name", str, where=where),
    )


def _message(raw: Any, *, where: str) -> Message:
    if isinstance(raw, dict) and isinstance(raw.get("tool_calls"), list):
        raw = {**raw, "tool_calls": [_with_text_arguments(call) for call in raw["tool_calls"]]}
    message = chat_message(raw, kind="prompt", where=where)
    if message.content is None and message.tool_calls is None:
        message = message._replace(content="")
    blocks = field(raw, "thinking_blocks", list, where=where) or []
    if message.reasoning_content is None and blocks:
        thoughts = [block.get("thinking") for block in blocks if isinstance(block, dict)]
        text = "".join(thought for thought in thoughts if isinstance(thought, str))
        message = message._replace(reasoning_content=text or None)
    return message


def _with_text_arguments(call: Any) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), (dict, list)):
        return call
    return {**call, "function": {**function, "arguments": dump(function["arguments"])}}


def _by_harness(message: Message, *, not_the_model: str | None) -> bool:
    text = (message.content or "").strip()
    if message.tool_calls is not None:
        return False
    return text == not_the_model or _HARNESS_EXIT.fullmatch(text) is not None
