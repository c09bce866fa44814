"""One trajectory as lines to read: its steps by label, or its tokens by weight.

    === step 5 | harmful | weight 0 | edit-refused: "No replacement was performed"
        what the agent wrote
    --- observation (user)
        what came back, its middle left out where it is long

Lines that begin with `===` carry weight, or would but for their label; `---` is context. Colour
adds nothing that the text does not say, so that the output reads the same in a file, a diff or a
golden test. Control characters of a recorded terminal are shown, never obeyed.
"""

from collections import Counter
from collections.abc import Iterator
from typing import Any, Final

import orjson

from srft_prep.config import OUTCOMES
from srft_prep.hostile_text import printable, written_out
from srft_prep.inspection import Judgement, Shown, ShownTokens, ShownTrajectory
from srft_prep.packed_steps import Stretch
from srft_prep.types import LABELS, Label, Message, Trajectory
from srft_prep.weights import DEFAULT_WEIGHTS, RECIPES

Line = tuple[str, dict[str, Any]]
"""A line of text and its style, in click's words."""

LABEL_STYLE: Final[dict[Label | None, dict[str, Any]]] = {
    "good": {"fg": "green"},
    "unnecessary": {"fg": "yellow"},
    "harmful": {"fg": "red"},
    None: {},
}
DIM: Final[dict[str, Any]] = {"dim": True}
BOLD: Final[dict[str, Any]] = {"bold": True}
SHOWN_LINES: Final = 12
"""Lines of context that are shown, half from its start and half from its end."""


def lines(shown: Shown, *, full: bool = False) -> Iterator[Line]:
    """Yield the lines that show what `find` found; `full` shows long context whole."""
    if isinstance(shown, ShownTrajectory):
        found = _step_lines(shown, full=full)
    else:
        found = (line for each in shown for line in _token_lines(each, full=full))
    for text, style in found:
        yield printable(text).rstrip(), style


def _step_lines(shown: ShownTrajectory, *, full: bool) -> Iterator[Line]:
    trajectory, judged = shown.trajectory, shown.judgements
    for number, (name, value) in enumerate(summary(shown)):
        yield f"{name:12}{value}", {} if number else BOLD
    step = -1
    for message in trajectory.messages:
        yield "", {}
        if message.kind == "action":
            step += 1
            judgement = (judged or {}).get(step)
            style = LABEL_STYLE[judgement.label if judgement else None]
            title = f"=== step {step}"
            if judged is not None:
                title += f" | {verdict(judgement, trajectory)}"
            reason = judgement.rationale if judgement else None
            yield f"{title} | {reason}" if reason else title, {**style, "bold": True}
        else:
            style = DIM
            yield f"--- {message_title(message)}", DIM
        clip = None if full or message.kind == "action" else SHOWN_LINES
        for line in clipped(_text_lines(message), clip):
            yield f"    {line}", style


def summary(shown: ShownTrajectory) -> Iterator[tuple[str, str]]:
    """Yield the names and values that head a trajectory."""
    trajectory, judged = shown.trajectory, shown.judgements
    counts = Counter(each.label for each in (judged or {}).values())
    counted = ", ".join(f"{counts[label]} {label}" for label in LABELS if counts[label])
    yield "trajectory", trajectory.trajectory_id
    yield "instance", trajectory.instance_id or "-"
    yield "format", trajectory.format
    yield "outcome", OUTCOMES[trajectory.resolved]
    yield "steps", f"{trajectory.num_steps}{': ' + counted if counted else ''}"
    if judged is not None:
        whole = RECIPES["srft"].treatment(trajectory.resolved) == "whole"
        by_label = " ".join(f"{label}={DEFAULT_WEIGHTS[label]:g}" for label in LABELS)
        yield "weights", f"recipe srft, {'whole: 1 everywhere' if whole else by_label}"


def verdict(judgement: Judgement | None, trajectory: Trajectory) -> str:
    """Return a step's label and the weight that it has under srft."""
    label = judgement.label if judgement else None
    if RECIPES["srft"].treatment(trajectory.resolved) == "whole":
        return f"{label or 'no label'} | weight 1"
    return f"{label} | weight {DEFAULT_WEIGHTS[label]:g}" if label else "no label"


def message_title(message: Message) -> str:
    """Return what a message that is no action is: its kind, and who speaks."""
    name = f" {message.name}" if message.name else ""
    return f"{message.kind} ({message.role}{name})"


def _token_lines(shown: ShownTokens, *, full: bool) -> Iterator[Line]:
    """Yield the lines of a document: its stretches whole, what lies between them clipped."""
    for number, (name, value) in enumerate(shown.facts):
        yield f"{name:12}{value}", {} if number else BOLD
    position, ids = 0, shown.ids
    for stretch in [*shown.stretches, Stretch(start=len(ids), end=len(ids))]:
        if stretch.start > position:
            yield "", {}
            yield f"--- tokens {position}-{stretch.start} | {shown.context}", DIM
            text = shown.decode(ids[position : stretch.start])
            for line in clipped(text.split("\n"), None if full else SHOWN_LINES):
                yield f"    {line}", DIM
        if stretch.end > stretch.start:
            yield "", {}
            style = _stretch_style(stretch)
            title = f"=== tokens {stretch.start}-{stretch.end} | {stretch.title}"
            yield title, {**style, "bold": True}
            for line in shown.decode(ids[stretch.start : stretch.end]).split("\n"):
                yield f"    {line}", style
        position = stretch.end


def _stretch_style(stretch: Stretch) -> dict[str, Any]:
    if stretch.weight is None or stretch.weight >= 1:
        return LABEL_STYLE["good"]
    if stretch.weight > 0:
        return LABEL_STYLE["unnecessary"]
    return LABEL_STYLE["harmful"] if stretch.label == "harmful" else DIM


def clipped(lines: list[str], limit: int | None) -> list[str]:
    """Return lines with the middle replaced by a count, where there are more than `limit`."""
    if limit is None or len(lines) <= limit + 1:
        return lines
    half = limit // 2
    return [*lines[:half], f"[... {len(lines) - 2 * half} more lines ...]", *lines[-half:]]


def _text_lines(message: Message) -> list[str]:
    found: list[str] = []
    if message.reasoning_content:
        thoughts = message.reasoning_content.removesuffix("\n").split("\n")
        found += ["[reasoning]", *thoughts, "[/reasoning]"]
    if message.content:
        found += message.content.removesuffix("\n").split("\n")
    if message.tool_calls:
        found += [f"> {_call_text(call)}" for call in orjson.loads(message.tool_calls)]
    return found


def _call_text(call: Any) -> str:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        return written_out(call)
    return f"{function.get('name')}({written_out(function.get('arguments', ''))})"
