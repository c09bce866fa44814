"""A trajectory as the page is given it: blocks of text, long ones cut, the rest to be asked for.

Nothing is markup here, and nothing becomes markup later: a block is a string that the page puts
into text nodes, and says what it is (`part`), so that the page knows how to colour it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import orjson

from srft_prep.hostile_text import parsed_arguments, written_out
from srft_prep.types import Message, Trajectory

PREVIEW_CHARS: Final = 4_000
"""Of what came back, in the first answer: it is folded, and most of it is never read."""
ACTION_CHARS: Final = 20_000
"""Of anything else."""
MORE_CHARS: Final = 100_000
"""The most that one request for more is given."""

OLD_TEXT: Final = {"old_str", "old_string", "old_text", "old_content", "search"}
NEW_TEXT: Final = {"new_str", "new_string", "new_text", "new_content", "replace", "file_text"}
"""What editing tools call the text that goes and the one that comes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """One text of a message."""

    part: str
    """`reasoning`, `content`, `call`, `argument`, `old` or `new`."""
    text: str
    title: str = ""
    """The tool's name of a `call`, the argument's of others."""


def messages_of(trajectory: Trajectory) -> list[dict[str, Any]]:
    """Return the messages of a trajectory with their blocks, and the step each belongs to.

    A message before the first step belongs to step -1.
    """
    step = -1
    found = []
    for number, message in enumerate(trajectory.messages):
        step += message.kind == "action"
        limit = PREVIEW_CHARS if message.kind in ("observation", "demo") else ACTION_CHARS
        found.append(
            {
                "number": number,
                "step": step,
                "kind": message.kind,
                "role": message.role,
                "name": message.name,
                "blocks": [
                    {"part": block.part, "title": block.title, **piece_of(block.text, 0, limit)}
                    for block in blocks_of(message)
                ],
            }
        )
    return found


def piece_of(text: str, start: int, limit: int = MORE_CHARS) -> dict[str, Any]:
    """Return at most `limit` characters of a text from `start`, ending with a line if need be.

    Returns:
        `text`, `end` (where it ends) and `total`, in characters of the whole.
    """
    end = min(len(text), start + limit)
    if end < len(text):
        line_end = text.rfind("\n", start + limit // 2, end)
        end = line_end + 1 if line_end >= 0 else end
    return {"text": text[start:end], "end": end, "total": len(text)}


def blocks_of(message: Message) -> list[Block]:
    """Return the texts of a message, in their order."""
    found = []
    if message.reasoning_content:
        found.append(Block(part="reasoning", text=message.reasoning_content))
    if message.content:
        found.append(Block(part="content", text=message.content))
    if message.tool_calls:
        for call in orjson.loads(message.tool_calls):
            found += _call_blocks(call)
    return found


def _call_blocks(call: Any) -> Iterator[Block]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        yield Block(part="call", text=written_out(call))
        return
    yield Block(part="call", title=str(function.get("name")), text="")
    arguments = parsed_arguments(function.get("arguments"))
    if isinstance(arguments, dict):
        for name, value in arguments.items():
            part = "old" if name in OLD_TEXT else "new" if name in NEW_TEXT else "argument"
            yield Block(part=part, title=name, text=written_out(value))
    elif arguments:
        yield Block(part="argument", text=written_out(arguments))
