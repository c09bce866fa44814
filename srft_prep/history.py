"""A trajectory -> the renderings to train on, and what the template does to its history.

The first rendering is the final one, `full`. Where a later message changes what was there, the
model never saw that text: `auto` refuses it, and `per-step` makes a rendering for every step.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import orjson

from srft_prep.config import History
from srft_prep.errors import FormatError
from srft_prep.render import (
    ChatTemplate,
    Rendering,
    action_span,
    template_messages,
    template_tools,
)
from srft_prep.types import Trajectory


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """A rendering and where its steps lie in it; all ranges are half-open, of characters."""

    rendering: Rendering
    spans: tuple[tuple[int, int, int], ...]
    """(step, start, end), in order."""
    parts: tuple[tuple[int, str, int, int], ...] = ()
    """(step, part, start, end): a step's parts are disjoint, in order, and cover its span."""
    fields: tuple[tuple[int, str, int, int, int], ...] = ()
    """(step, field, start, end, skipped), counted from the start of the step's span."""
    conventions: tuple[tuple[str, int, int, int], ...] = ()
    """(convention, step, start, end): what another tool would train; step -1 for no step."""


class Renderer:
    """A chat template with its assistant header, applied to trajectories."""

    def __init__(self, template: ChatTemplate) -> None:
        """Find the assistant header.

        Raises:
            ConfigError: the template has no generation prompt.
        """
        self.template = template
        self.header = template.generation_prompt([{"role": "user", "content": "-"}])

    def conversations(self, trajectory: Trajectory, *, history: History) -> list[Conversation]:
        """Return the renderings to train on: one, or with `per-step` one a step.

        Raises:
            FormatError: the template refuses the conversation, or rewrites its history although
                `history` is `auto`.
        """
        messages, indices = template_messages(trajectory)
        tools = template_tools(trajectory)
        if not messages:
            raise FormatError("no message of a role that chat templates know")
        actions = _actions(trajectory, indices)
        if history == "per-step":
            return [
                self._conversation(messages[: position + 1], tools, {step: position})
                for step, position in enumerate(actions)
            ]
        whole = self._conversation(messages, tools, dict(enumerate(actions)))
        if history == "auto" and (where := self.rewrites_history(trajectory, whole, num_cuts=2)):
            raise FormatError(
                f"the chat template rewrites what was there {where}; use --history per-step or full"
            )
        return [whole]

    def findings(
        self, trajectory: Trajectory, conversations: Sequence[Conversation]
    ) -> Counter[str]:
        """Count the steps of which the template left out a field without a word."""
        return Counter(
            f"dropped_{name}"
            for conversation in conversations
            for _, name in _left_out(trajectory, conversation)
        )

    def rewrites_history(
        self, trajectory: Trajectory, whole: Conversation, *, num_cuts: int
    ) -> str | None:
        """Return up to where a later message changes the rendering, None for nowhere.

        What the model saw at a step, and what it saw and wrote, must both be starts of the whole
        rendering. Looks at `num_cuts` steps spread over the trajectory, the last and the first
        included, and at the first step of which the whole rendering leaves out a field.
        """
        messages, indices = template_messages(trajectory)
        tools = template_tools(trajectory)
        actions = _actions(trajectory, indices)
        text = whole.rendering.text
        cuts = np.linspace(len(actions) - 1, 0, num=min(num_cuts, len(actions)), dtype=int).tolist()
        incomplete = (step for step, _ in _left_out(trajectory, whole))
        for step in dict.fromkeys([*cuts, *islice(incomplete, 1)]):
            position = actions[step]
            if position > 0:
                seen = self.template.render(messages[:position], tools, add_generation_prompt=True)
                if not text.startswith(seen.text):
                    return f"before step {step}"
            if position + 1 < len(messages):
                wrote = self._conversation(messages[: position + 1], tools, {step: position})
                if not text.startswith(wrote.rendering.text[: wrote.spans[0][2]]):
                    return f"up to the end of step {step}"
        return None

    def _conversation(
        self, messages: list[dict[str, Any]], tools: Any, actions: dict[int, int]
    ) -> Conversation:
        rendering = self.template.render(messages, tools)
        end = self.template.control_tokens
        return Conversation(
            rendering=rendering,
            spans=tuple(
                (step, *action_span(rendering, position, header=self.header, end=end))
                for step, position in actions.items()
            ),
        )


def _actions(trajectory: Trajectory, indices: Sequence[int]) -> list[int]:
    """Return which of the rendered messages are actions; `indices` is their place before."""
    return [i for i, index in enumerate(indices) if trajectory.messages[index].kind == "action"]


def _left_out(trajectory: Trajectory, conversation: Conversation) -> Iterator[tuple[int, str]]:
    """Yield (step, field) for every field of an action that is not in its rendering."""
    for step, start, end in conversation.spans:
        action = trajectory.steps[step].action
        written = conversation.rendering.text[start:end]
        if action.content and action.content.strip() not in written:
            yield step, "content"
        if action.reasoning_content and action.reasoning_content.strip() not in written:
            yield step, "reasoning_content"
        if action.tool_calls is not None and _first_name(action.tool_calls) not in written:
            yield step, "tool_calls"


def _first_name(tool_calls: str) -> str:
    name: str = orjson.loads(tool_calls)[0]["function"]["name"]
    return name
