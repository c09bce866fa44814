r"""What the agent wrote in one message's rendering: span, parts and fields.

**The header** is what the template gives to the model before it writes: what
`add_generation_prompt` writes at that place of a conversation. It depends on the message before
(`<|tool_outputs_end|>` in DeepSeek, nothing in Mistral), and is learnt from probes (`probes`). A
turn begins with the whole of it, or, where the template drops the end of the prompt from history
(`<think>\n`), with the part that the probes show to be common to turns of any text. A turn that
begins otherwise is refused. So a header is never longer because a message happens to go on like the
prompt.

**The end of turn** is what the probes show to close a turn, else the last control token of the
template's own in the message's rendering. Where the template writes none (GLM), the token that
opens the next turn ends it, unless assistant turns open with the same one; else the turn has none.
The agent wrote neither the header nor what follows the end of turn (a newline, in ChatML).

**Parts** cover the span: the thought is everything up to the calls' mark, the tool call up to the
end of turn. **Fields** are placed exactly or left out: the content must end the thought, up to
white space and what the probes show to follow it there; the reasoning must begin where it does in
the probes; both are compared with the text at that place.
"""

import re
from dataclasses import dataclass
from typing import Any

from srft_prep.errors import FormatError
from srft_prep.render import Rendering


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """One way in which turns end."""

    text: str
    """From the end of turn to the end of the message's rendering."""
    token: int
    """Characters of it that are the end of turn; what follows, the agent did not write."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnForm:
    """How a template writes assistant turns."""

    header: str
    """What the template gives to the model after a user's message."""
    headers: dict[str, tuple[str, ...]]
    """Role of the message before -> the headers that turns may begin with, the longest first."""
    endings: tuple[Ending, ...]
    """The longest first; none where no turn has an end of its own."""
    openers: tuple[str, ...]
    """What stands between the header and the reasoning, the longest first."""
    closers: tuple[str, ...]
    """What stands between the content and the thought's end, beside white space."""
    content_is_parts: bool
    """Whether the template wants a message's content as a list of parts."""
    answers_inside: bool
    """Whether the template writes a tool's answer inside the turn that called it."""
    shows_calls: bool
    """Whether the template writes a message's tool calls at all."""
    control_tokens: re.Pattern[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """Where one assistant turn's parts lie in a rendering, in characters."""

    start: int
    """Behind the header."""
    calls: int | None
    """Where the tool calls begin, None where there are none or nobody knows."""
    ending: int
    """Where the end of turn begins."""
    end: int

    @property
    def thought_end(self) -> int:
        """Where the thought ends."""
        return self.ending if self.calls is None else self.calls


def find_turn(form: TurnForm, rendering: Rendering, index: int, *, after: str | None) -> Turn:
    """Return where the agent's turn lies in the rendering of one message.

    Args:
        form: how the template writes turns.
        rendering: a whole conversation.
        index: the message's.
        after: the role of the message before it; None for the first.

    Raises:
        FormatError: the template writes nothing for the message, or starts it unlike all probes.
    """
    begun, stop = rendering.segments.get(index, (0, 0))
    if begun == stop:
        raise FormatError(f"message {index}: the chat template writes no turn for it")
    text = rendering.text
    headers = form.headers.get(after or "") or form.headers[""]
    for header in headers:
        if text.startswith(header, begun):
            break
    else:
        header = None
    if header is None or (
        rendering.forged and _overlaps(rendering.forged, begun, begun + len(header))
    ):
        raise FormatError(
            f"message {index}: the chat template writes an assistant turn that does not start with "
            f"its generation prompt {headers[0]!r}, but {text[begun : begun + len(headers[0])]!r}"
        )
    start = begun + len(header)
    ending, end = _find_end(form, rendering, start, stop, header)
    calls = rendering.calls.get(index)
    if calls is not None:
        calls = min(max(calls, start), ending)
    return Turn(start=start, calls=calls, ending=ending, end=end)


def _find_end(
    form: TurnForm, rendering: Rendering, start: int, stop: int, header: str
) -> tuple[int, int]:
    text, forged = rendering.text, rendering.forged
    for each in form.endings:
        ending = stop - len(each.text)
        if ending >= start and text.endswith(each.text, start, stop):
            end = ending + each.token
            if not forged or not _overlaps(forged, ending, end):
                return ending, end
    last = None
    for match in form.control_tokens.finditer(text, start, stop) if form.endings else ():
        if not forged or not _overlaps(forged, *match.span()):
            last = match
    if last is not None:
        return last.span()
    following = form.control_tokens.match(text, stop)
    opens = form.control_tokens.match(header)
    if following and opens and following[0] != opens[0]:
        is_turn = any(begun == stop for begun, _ in rendering.segments.values())
        if is_turn and not _overlaps(forged, *following.span()):
            return following.span()
    return stop, stop


def parts_of(turn: Turn) -> list[tuple[str, int, int]]:
    """Return (part, start, end) of a turn's parts that are not empty."""
    parts = []
    if turn.start < turn.thought_end:
        parts.append(("thought", turn.start, turn.thought_end))
    if turn.calls is not None and turn.calls < turn.ending:
        parts.append(("tool_call", turn.calls, turn.ending))
    if turn.ending < turn.end:
        parts.append(("end_of_turn", turn.ending, turn.end))
    return parts


def place_content(
    form: TurnForm, rendering: Rendering, turn: Turn, content: str
) -> tuple[int, int, int] | None:
    """Return (start, end, skipped) of the content, None where it does not stand."""
    text, limit = rendering.text, turn.thought_end
    if text.endswith(content, turn.start, limit):
        return limit - len(content), limit, 0
    stripped = content.strip()
    for closer in form.closers:
        if not text.endswith(closer, turn.start, limit):
            continue
        until = limit - len(closer)
        end = turn.start + len(text[turn.start : until].rstrip())
        if text.endswith(stripped, turn.start, end):
            bounds = turn.start, until
            return _with_spaces(text, content, end - len(stripped), end, bounds)
    return None


def place_reasoning(
    form: TurnForm, rendering: Rendering, turn: Turn, reasoning: str, *, limit: int
) -> tuple[int, int, int] | None:
    """Return (start, end, skipped) of the reasoning, None where it does not stand.

    It ends at `limit` or before.
    """
    text, stripped = rendering.text, reasoning.strip()
    for opener in form.openers:
        if text.startswith(opener, turn.start):
            start = turn.start + len(opener)
            while start < limit and text[start].isspace():
                start += 1
            if text.startswith(stripped, start) and start + len(stripped) <= limit:
                bounds = turn.start + len(opener), limit
                return _with_spaces(text, reasoning, start, start + len(stripped), bounds)
    return None


def _with_spaces(
    text: str, field: str, start: int, end: int, bounds: tuple[int, int]
) -> tuple[int, int, int]:
    """Return (start, end, skipped) of a field with those of its outer spaces that stand there."""
    skipped = len(field) - len(field.lstrip())
    length = len(field.rstrip())
    while skipped and start > bounds[0] and text[start - 1] == field[skipped - 1]:
        skipped, start = skipped - 1, start - 1
    while length < len(field) and end < bounds[1] and text[end] == field[length]:
        length, end = length + 1, end + 1
    return start, end, skipped


def _overlaps(ranges: tuple[tuple[int, int], ...], start: int, end: int) -> bool:
    return any(begin < end and start < stop for begin, stop in ranges)


def as_parts(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return messages with their text as lists of parts, for templates that want it so."""
    return [
        {**message, "content": [{"type": "text", "text": message["content"]}]}
        if isinstance(message.get("content"), str)
        else message
        for message in messages
    ]
