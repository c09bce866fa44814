"""Hypothesis strategies for the words of the house: messages, trajectories, labels, token rows."""

import math
from typing import Any

import orjson
from hypothesis import strategies as st

from srft_prep.critic import StepLabel
from srft_prep.types import LABELS, Kind, Label, Message, Trajectory

Spans = list[tuple[int, int, int]]

PIECES = (
    "<|im_end|>",
    "<|im_start|>assistant\n",
    "\x1b[31mred\x1b[0m",
    "\u202eltr",
    "\r\n",
    "\x00",
    "```bash\nls\n```",
    "é…🙂",
)
"""Pieces of text that have broken something somewhere."""

ROLES: dict[Kind, tuple[str, ...]] = {
    "prompt": ("system", "user"),
    "action": ("assistant",),
    "observation": ("user", "tool"),
    "demo": ("user", "assistant"),
    "artifact": ("assistant", "exit"),
}


def texts(max_size: int = 40) -> st.SearchStrategy[str]:
    """Any text that a file can hold, now and then with a piece that has broken something."""
    plain = st.text(st.characters(exclude_categories=["Cs"]), max_size=max_size)
    return st.lists(plain | st.sampled_from(PIECES), max_size=3).map("".join)


def tool_calls() -> st.SearchStrategy[str]:
    """Tool calls of one message in OpenAI's form, as JSON."""
    arguments = st.dictionaries(st.sampled_from(["command", "path"]), texts(), max_size=2)
    call = st.builds(
        lambda name, values: {
            "id": f"call-{name}",
            "type": "function",
            "function": {"name": name, "arguments": orjson.dumps(values).decode()},
        },
        st.sampled_from(["bash", "edit"]),
        arguments,
    )
    return st.lists(call, min_size=1, max_size=2).map(lambda calls: orjson.dumps(calls).decode())


@st.composite
def messages(draw: st.DrawFn, kind: Kind) -> Message:
    """A message of one kind."""
    calls = draw(st.none() | tool_calls()) if kind == "action" else None
    content = draw(st.none() | texts()) if calls else draw(texts())
    return Message(
        role=draw(st.sampled_from(ROLES[kind])),
        kind=kind,
        content=content,
        reasoning_content=draw(st.none() | texts()) if kind == "action" else None,
        tool_calls=calls,
        name=draw(st.none() | st.just("bash")) if kind == "observation" else None,
    )


@st.composite
def trajectories(
    draw: st.DrawFn, *, trajectory_id: str = "run-1", min_steps: int = 0, max_steps: int = 5
) -> Trajectory:
    """A trajectory: prompts, perhaps a demonstration, then actions with their observations."""
    parts = [draw(messages("prompt")) for _ in range(draw(st.integers(0, 2)))]
    parts += [draw(messages("demo")) for _ in range(draw(st.integers(0, 1)))]
    for _ in range(draw(st.integers(min_steps, max_steps))):
        parts.append(draw(messages("action")))
        parts += [draw(messages("observation")) for _ in range(draw(st.integers(0, 2)))]
        parts += [draw(messages("artifact")) for _ in range(draw(st.integers(0, 1)))]
    return Trajectory(
        trajectory_id=trajectory_id,
        instance_id=draw(st.sampled_from(["", "owner__name-1"])),
        format="messages",
        messages=tuple(parts),
        resolved=draw(st.none() | st.booleans()),
    )


def labels() -> st.SearchStrategy[Label]:
    """good, unnecessary or harmful."""
    return st.sampled_from(LABELS)


@st.composite
def probabilities(draw: st.DrawFn) -> tuple[float, float, float]:
    """Three probabilities that sum to 1."""
    raw = [draw(st.floats(0.0, 1.0)) + 1e-6 for _ in LABELS]
    good, unnecessary, harmful = (each / math.fsum(raw) for each in raw)
    return good, unnecessary, harmful


@st.composite
def step_labels(draw: st.DrawFn, step_index: int) -> StepLabel:
    """A label of one step, with or without probabilities."""
    chances: dict[str, Any] = {}
    if draw(st.booleans()):
        chances = {f"p_{name}": p for name, p in zip(LABELS, draw(probabilities()), strict=True)}
    return StepLabel(
        step_index=step_index,
        label=draw(labels()),
        rationale=draw(st.none() | texts()),
        **chances,
    )


def weights() -> st.SearchStrategy[float]:
    """Weights of steps: often 0 or 1, as in the paper."""
    return st.sampled_from([0.0, 1.0]) | st.floats(0.0, 8.0, width=32)


@st.composite
def token_rows(
    draw: st.DrawFn, *, max_steps: int = 8, max_piece: int = 30
) -> tuple[int, Spans, list[float]]:
    """The shape of a token row: its length, the spans of its steps, the weight of each span."""
    position = 0
    spans: Spans = []
    for step in range(draw(st.integers(0, max_steps))):
        start = position + draw(st.integers(0, max_piece))
        position = start + draw(st.integers(0, max_piece))
        spans.append((step, start, position))
    num_tokens = max(1, position + draw(st.integers(0, max_piece)))
    return num_tokens, spans, [draw(weights()) for _ in spans]
