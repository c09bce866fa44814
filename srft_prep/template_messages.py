"""What a chat template is given: a trajectory's messages and tools as plain dictionaries.

Tool arguments are parsed here, as inference servers do before rendering.
"""

import json
from typing import Any, Final

import orjson

from srft_prep.types import CHAT_ROLES, Trajectory

_MAX_NESTING: Final = 200
"""Arguments that are nested deeper stay the text that they were: Python's recursion is limited."""


def template_messages(trajectory: Trajectory) -> tuple[list[dict[str, Any]], list[int]]:
    """Return the messages that a template is given, and each one's index in the trajectory.

    Messages of a role that chat templates do not know (`exit`) are left out. Empty fields are left
    out. Tool arguments that are JSON text of an object are parsed, as inference servers do before
    rendering and as transformers asks for; other arguments stay text.
    """
    messages: list[dict[str, Any]] = []
    indices: list[int] = []
    for index, message in enumerate(trajectory.messages):
        if message.role not in CHAT_ROLES:
            continue
        row: dict[str, Any] = {"role": message.role}
        for name in ("content", "reasoning_content", "tool_call_id", "name"):
            value = getattr(message, name)
            if value is not None:
                row[name] = value
        if message.tool_calls is not None:
            row["tool_calls"] = [_parsed_call(call) for call in orjson.loads(message.tool_calls)]
        messages.append(row)
        indices.append(index)
    return messages, indices


def template_tools(trajectory: Trajectory) -> list[dict[str, Any]] | None:
    """Return the tool definitions that a template is given."""
    return orjson.loads(trajectory.tools) if trajectory.tools else None


def strings_of(messages: list[dict[str, Any]], tools: Any) -> list[str]:
    """Return all strings of a conversation, keys of nested values included."""
    found: list[str] = []
    pending: list[Any] = [tools] if tools else []
    for message in messages:
        for value in message.values():
            if type(value) is str:
                found.append(value)
            else:
                pending.append(value)
    while pending:
        each = pending.pop()
        if isinstance(each, str):
            found.append(each)
        elif isinstance(each, dict):
            pending += each
            pending += each.values()
        elif isinstance(each, list | tuple):
            pending += each
    return found


def _parsed_call(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            parsed = json.loads(arguments)  # not orjson, which turns long integers into floats
            if isinstance(parsed, dict) and _is_flat(arguments, parsed) and _is_encodable(parsed):
                return {**call, "function": {**function, "arguments": parsed}}
        except (ValueError, RecursionError):
            return call
    return call


def _is_flat(text: str, value: Any) -> bool:
    """Return whether a value is nested less than what every template can write."""
    if text.count("{") + text.count("[") <= _MAX_NESTING:
        return True
    level = [value]
    for _ in range(_MAX_NESTING):
        inner = (each.values() if isinstance(each, dict) else each for each in level)
        level = [each for values in inner for each in values if isinstance(each, dict | list)]
        if not level:
            return True
    return False


def _is_encodable(value: Any) -> bool:
    """Return whether no string holds a lone surrogate, which no tokenizer takes."""
    try:
        "".join(strings_of([], value)).encode()
    except UnicodeEncodeError:
        return False
    return True
