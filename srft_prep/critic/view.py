"""What a critic sees of a trajectory: the task, and every step as tagged pieces of text.

Clipping takes the middle out of a piece and says in its place how much is missing, so that nothing
is cut silently. Demonstrations are left out, with a note: the agent did not do what they show.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import orjson

from srft_prep.types import Message, Trajectory

HEAD_SHARE: Final = 0.6
"""How much of what is kept of a clipped text comes from its start."""
ACTION_CHARS: Final = 140
OBSERVATION_CHARS: Final = 80
"""What the digest tells of a step."""

_FENCE: Final = re.compile(r"```[\w.+-]*\n(.*?)```", re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """One text of a step."""

    tag: str
    text: str

    def __str__(self) -> str:
        return f"<{self.tag}>\n{self.text}\n</{self.tag}>\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class StepView:
    """One step as a critic sees it."""

    index: int
    pieces: tuple[Piece, ...]
    """The action first, then what came back, in order."""

    def __str__(self) -> str:
        return f"<step {self.index}>\n{''.join(map(str, self.pieces))}</step>\n"


_LEFT_OUT_DEMO: Final = Piece(tag="message", text="[a demonstration, left out]")


def task_of(trajectory: Trajectory) -> str:
    """Return all that the agent was told before its first step."""
    parts: list[str] = []
    num_demos = 0
    for message in trajectory.messages:
        if message.kind == "action":
            break
        if message.kind == "demo":
            num_demos += 1
        elif text := _text_of(message):
            parts.append(text)
    if num_demos:
        parts.append(f"[a demonstration of {num_demos} messages, left out]")
    return "\n\n".join(parts)


def steps_of(trajectory: Trajectory) -> list[StepView]:
    """Return the steps of a trajectory as a critic sees them."""
    found: list[list[Piece]] = []
    for message in trajectory.messages:
        if message.kind == "action":
            found.append([Piece(tag="action", text=_text_of(message))])
        elif found and message.kind == "demo":
            if found[-1][-1] != _LEFT_OUT_DEMO:
                found[-1].append(_LEFT_OUT_DEMO)
        elif found:
            tag = "observation" if message.kind == "observation" else "message"
            found[-1].append(Piece(tag=tag, text=_text_of(message)))
    return [StepView(index=index, pieces=tuple(pieces)) for index, pieces in enumerate(found)]


def digest_line(step: StepView) -> str:
    """Return a step in a line: what was done, and how the answer to it begins."""
    action, *others = step.pieces
    blocks = _FENCE.findall(action.text)
    done = _line(blocks[-1] if blocks else action.text, ACTION_CHARS)
    came = _line(others[0].text, OBSERVATION_CHARS) if others else ""
    return f"step {step.index}: {done}{f' => {came}' if came else ''}"


def clipped(text: str, *, num_chars: int, left_out: int) -> str:
    """Return a text with `num_chars` of its characters left, and a note in place of its middle."""
    head = int(num_chars * HEAD_SHARE)
    tail = num_chars - head
    return f"{text[:head]}{note(left_out)}{text[len(text) - tail :]}"


def note(left_out: int) -> str:
    """Return the note that stands for so many tokens."""
    return f"\n[... {left_out} tokens left out ...]\n"


def _text_of(message: Message) -> str:
    parts: list[str] = []
    if message.reasoning_content:
        parts.append(f"<thoughts>\n{message.reasoning_content}\n</thoughts>")
    if message.content:
        parts.append(message.content)
    if message.tool_calls:
        parts += [_call_text(call) for call in orjson.loads(message.tool_calls)]
    return "\n".join(parts)


def _call_text(call: dict[str, object]) -> str:
    """Return a tool call, its arguments as text: an escaped newline costs tokens and hides code."""
    function = call.get("function")
    name, arguments = "", ""
    if isinstance(function, dict):
        name, arguments = str(function.get("name")), function.get("arguments") or ""
    if isinstance(arguments, str):
        try:
            parsed = orjson.loads(arguments)
            orjson.dumps(parsed)  # refuses what it reads where that is nested very deeply
        except (orjson.JSONDecodeError, orjson.JSONEncodeError):
            parsed = arguments
    else:
        parsed = arguments
    if isinstance(parsed, dict):
        lines = [f"{key}: {_argument(value)}" for key, value in parsed.items()]
        parsed = "\n".join(lines)
    return f"<call {name}>\n{_argument(parsed)}\n</call>"


def _argument(value: object) -> str:
    return value if isinstance(value, str) else orjson.dumps(value).decode()


def _line(text: str, limit: int) -> str:
    line = " ".join(text[: 8 * limit].split())
    return line if len(line) <= limit else f"{line[: limit - 1]}…"


def joined(steps: Sequence[StepView]) -> str:
    """Return the text of some steps."""
    return "".join(map(str, steps)).rstrip("\n")
