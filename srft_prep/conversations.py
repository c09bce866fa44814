"""One rendering of a trajectory, and where its steps lie in it.

`conversation_of` finds the steps, `put_behind` and `joined` make sequences of several renderings.
"""

from dataclasses import dataclass, replace
from typing import Any

from srft_prep.conventions import blocks_of_turns
from srft_prep.render import Rendering
from srft_prep.turns import Turn, TurnForm, find_turn, parts_of, place_content, place_reasoning


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """A rendering and where its steps lie in it; all ranges are half-open, of characters."""

    rendering: Rendering
    spans: tuple[tuple[int, int, int], ...]
    """(step, start, end), in order."""
    parts: tuple[tuple[int, str, int, int], ...] = ()
    """(step, part, start, end): a step's parts are disjoint, in order, and cover its span; none for
    a step whose tool calls are somewhere in it, nobody knows where."""
    fields: tuple[tuple[int, str, int, int, int], ...] = ()
    """(step, field, start, end, skipped), counted from the start of the step's span."""
    conventions: tuple[tuple[str, int, int, int], ...] = ()
    """(convention, step, start, end): what another tool would train; step -1 for no step."""
    num_dropped_answers: int = 0
    """Messages of tools that the template left out."""


def conversation_of(
    form: TurnForm, rendering: Rendering, messages: list[dict[str, Any]], actions: dict[int, int]
) -> Conversation:
    """Find the steps of a rendering; `actions` is each step's message."""
    spans: list[tuple[int, int, int]] = []
    parts: list[tuple[int, str, int, int]] = []
    fields: list[tuple[int, str, int, int, int]] = []
    for step, position in actions.items():
        after = messages[position - 1]["role"] if position else None
        turn = find_turn(form, rendering, position, after=after)
        spans.append((step, turn.start, turn.end))
        message = messages[position]
        if form.shows_calls and turn.calls is None and _hides_calls(message, rendering, turn):
            continue
        begun = turn.start
        for part, start, end in parts_of(turn):
            parts.append((step, part, start, end))
        for name, start, end, skipped in _fields(form, rendering, turn, message):
            fields.append((step, name, start - begun, end - begun, skipped))
    steps = {position: step for step, position in actions.items()}
    return Conversation(
        rendering=rendering,
        spans=tuple(spans),
        parts=tuple(parts),
        fields=tuple(fields),
        conventions=tuple(
            ("trl", *turn)
            for turn in blocks_of_turns(rendering.generation, rendering.segments, steps)
        )
        if rendering.generation
        else (),
        num_dropped_answers=_num_dropped_answers(rendering, messages),
    )


def _hides_calls(message: dict[str, Any], rendering: Rendering, turn: Turn) -> bool:
    """Return whether a turn may show calls at a place that no mark tells."""
    calls = message.get("tool_calls")
    if not calls:
        return False
    return str(calls[0]["function"].get("name")) in rendering.text[turn.start : turn.end]


def _fields(
    form: TurnForm, rendering: Rendering, turn: Turn, message: dict[str, Any]
) -> list[tuple[str, int, int, int]]:
    found: list[tuple[str, int, int, int]] = []
    limit = turn.thought_end
    content, reasoning = message.get("content"), message.get("reasoning_content")
    if content and not content.isspace():
        place = place_content(form, rendering, turn, content)
        if place is not None:
            found.append(("content", *place))
            limit = place[0]
    if reasoning and not reasoning.isspace():
        place = place_reasoning(form, rendering, turn, reasoning, limit=limit)
        if place is not None:
            found.insert(0, ("reasoning_content", *place))
    return found


def _num_dropped_answers(rendering: Rendering, messages: list[dict[str, Any]]) -> int:
    """Count the messages of tools that are written neither alone nor with the one before."""
    count, dropped = 0, False
    for index, message in enumerate(messages):
        if message["role"] != "tool":
            continue
        if not index or messages[index - 1]["role"] != "tool":
            dropped = index not in rendering.segments
        count += dropped
    return count


def put_behind(seen: Rendering, wrote: Conversation, position: int) -> Conversation:
    """Return a conversation that begins with what the model saw, followed by what it wrote."""
    rendering = wrote.rendering
    if rendering.text.startswith(seen.text):
        return wrote
    ((step, start, end),) = wrote.spans
    shift = len(seen.text) - start
    stop = rendering.segments[position][1]
    return replace(
        wrote,
        rendering=Rendering(
            text=seen.text + rendering.text[start : max(stop, end)],
            segments={**seen.segments, position: (len(seen.text), max(stop, end) + shift)},
            forged=(
                *seen.forged,
                *((a + shift, b + shift) for a, b in rendering.forged if start <= a),
            ),
        ),
        spans=((step, start + shift, end + shift),),
        parts=tuple((which, part, a + shift, b + shift) for which, part, a, b in wrote.parts),
        conventions=tuple(
            (name, which, max(a, start) + shift, b + shift)
            for name, which, a, b in wrote.conventions
            if which == step and b > start
        ),
    )


def joined(first: Conversation, second: Conversation) -> Conversation:
    """Return two conversations of which the second begins with all that the first trains."""
    steps = {step for step, _, _ in (*first.spans, *second.spans)}
    trained = {step for step, _, _ in second.spans}
    return replace(
        second,
        spans=first.spans + second.spans,
        parts=first.parts + second.parts,
        fields=first.fields + second.fields,
        conventions=(
            *(each for each in first.conventions if each[1] in steps and each[1] not in trained),
            *(each for each in second.conventions if each[1] in trained),
        ),
    )
