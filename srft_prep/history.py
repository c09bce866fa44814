r"""A trajectory -> the renderings to train on, and what the template does to its history.

The final rendering is `full`. Where a later message changes what was there, the model never saw
that text: `auto` refuses it, and `per-step` trains every step once, in exactly the context that the
model saw. What the model saw at a step is the rendering of the messages before it with the
generation prompt; what it wrote is its turn where that is the last one. Step after step is joined
to one sequence for as long as what the model saw begins with all that the sequence holds up to the
end of its last step. So a conversation that only grows is one sequence, and one whose thoughts are
dropped at every question is one sequence a question.

Where the last turn does not begin with the whole of what the model saw (a template that drops
`<think>\n` at once), its text is put behind what the model saw.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np

from srft_prep.config import History
from srft_prep.conventions import Placeholders
from srft_prep.conversations import Conversation, conversation_of, joined, put_behind
from srft_prep.errors import FormatError
from srft_prep.findings import count_findings, missing_fields
from srft_prep.probes import learn_turns
from srft_prep.render import ChatTemplate, Prepared, Rendering
from srft_prep.template_messages import template_messages, template_tools
from srft_prep.turns import TurnForm, as_parts
from srft_prep.types import Trajectory

_EARLY_STEPS: Final = (1, 0)
"""Where every trajectory is checked under `auto`: the first step that follows another, and the one
before if no step comes after. The context is short there, so that it costs little, and most of the
trajectory is still to come to change it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HistoryCost:
    """What `full` and `per-step` make of some trajectories."""

    full_characters: int = 0
    full_sequences: int = 0
    per_step_characters: int = 0
    per_step_sequences: int = 0

    @property
    def factor(self) -> float:
        """How many times the text of `full` `per-step` has."""
        return self.per_step_characters / max(self.full_characters, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Chat:
    """A trajectory as a template gets it."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    prepared: Prepared
    actions: list[int]
    """Index of every step's message."""


class Renderer:
    """A chat template with what it was learnt to write, applied to trajectories."""

    def __init__(self, template: ChatTemplate, *, axolotl: bool = False) -> None:
        """Learn how the template writes turns.

        Args:
            template: the template.
            axolotl: find what axolotl would train, too.

        Raises:
            ConfigError: the template cannot be used; it says why.
        """
        self.template = template
        self.form: TurnForm = learn_turns(template)
        self.header = self.form.header
        self._placeholders = Placeholders(self._rendered) if axolotl else None

    def conversations(self, trajectory: Trajectory, *, history: History) -> list[Conversation]:
        """Return the renderings to train on: one, or with `per-step` as many as needed.

        Raises:
            FormatError: the template refuses the conversation, or rewrites its history although
                `history` is `auto`.
        """
        chat = self._chat(trajectory)
        if history == "per-step":
            return self._per_step(chat)
        whole = self._whole(chat)
        early = _EARLY_STEPS if len(chat.actions) <= len(_EARLY_STEPS) else _EARLY_STEPS[:1]
        if history == "auto" and (
            where := self._rewritten(trajectory, chat, whole, early, closely=False)
        ):
            raise FormatError(
                f"the chat template rewrites what was there {where}; use --history per-step or full"
            )
        return [whole]

    def findings(
        self, trajectory: Trajectory, conversations: Sequence[Conversation]
    ) -> Counter[str]:
        """Count what the template did to the steps, see `findings`."""
        counts: Counter[str] = Counter()
        for conversation in conversations:
            counts.update(count_findings(trajectory, conversation))
        return counts

    def rewrites_history(
        self, trajectory: Trajectory, whole: Conversation, *, num_cuts: int
    ) -> str | None:
        """Return up to where a later message changes the rendering, None for nowhere.

        What the model saw at a step, and what it saw and wrote, must both be starts of the whole
        rendering. Looks at `num_cuts` steps spread over the trajectory, the last and the first
        included, and at the first step of which the whole rendering leaves out a field.
        """
        chat = self._chat(trajectory)
        last = len(chat.actions) - 1
        cuts = np.linspace(last, 0, num=min(num_cuts, last + 1), dtype=int).tolist()
        return self._rewritten(trajectory, chat, whole, cuts)

    def cost(self, trajectories: Iterable[Trajectory]) -> HistoryCost:
        """Return what `full` and `per-step` make of a sample, those that are refused left out."""
        cost = HistoryCost()
        for trajectory in trajectories:
            try:
                full = self.conversations(trajectory, history="full")
                steps = self.conversations(trajectory, history="per-step")
            except FormatError:
                continue
            cost = HistoryCost(
                full_characters=cost.full_characters + _num_characters(full),
                full_sequences=cost.full_sequences + len(full),
                per_step_characters=cost.per_step_characters + _num_characters(steps),
                per_step_sequences=cost.per_step_sequences + len(steps),
            )
        return cost

    def _chat(self, trajectory: Trajectory) -> _Chat:
        messages, indices = template_messages(trajectory)
        if not messages:
            raise FormatError("no message of a role that chat templates know")
        kinds = [trajectory.messages[index].kind for index in indices]
        actions = [index for index, kind in enumerate(kinds) if kind == "action"]
        if self.form.answers_inside:
            _refuse_answers(messages, actions)
        tools = template_tools(trajectory)
        prepared = self._prepared(messages, tools)
        return _Chat(messages=messages, tools=tools, prepared=prepared, actions=actions)

    def _render(self, chat: _Chat, until: int, *, prompt: bool = False) -> Rendering:
        return self.template.write(chat.prepared, until, add_generation_prompt=prompt)

    def _rendered(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None
    ) -> Rendering:
        return self.template.write(self._prepared(messages, tools))

    def _prepared(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None
    ) -> Prepared:
        if self.form.content_is_parts:
            messages = as_parts(messages)
        return self.template.prepare(messages, tools)

    def _whole(self, chat: _Chat) -> Conversation:
        rendering = self._render(chat, len(chat.messages))
        whole = conversation_of(self.form, rendering, chat.messages, dict(enumerate(chat.actions)))
        return replace(whole, conventions=whole.conventions + self._by_axolotl(chat, rendering))

    def _by_axolotl(
        self, chat: _Chat, rendering: Rendering
    ) -> tuple[tuple[str, int, int, int], ...]:
        """Return what axolotl would train; nothing where it would stop at the conversation."""
        if self._placeholders is None:
            return ()
        steps = {position: step for step, position in enumerate(chat.actions)}
        try:
            turns = self._placeholders.written(rendering, chat.messages, chat.tools, steps=steps)
        except FormatError:
            return ()
        return tuple(("axolotl", *turn) for turn in turns)

    def _turn(self, chat: _Chat, step: int) -> Conversation:
        """Return a step's turn as it was the last one."""
        position = chat.actions[step]
        rendering = self._render(chat, position + 1)
        messages = chat.messages[: position + 1]
        return conversation_of(self.form, rendering, messages, {step: position})

    def _rewritten(
        self,
        trajectory: Trajectory,
        chat: _Chat,
        whole: Conversation,
        cuts: Iterable[int],
        *,
        closely: bool = True,
    ) -> str | None:
        """Look at some steps; unless closely, what the model saw is looked at for the first one."""
        text = whole.rendering.text
        incomplete = next((step for step, _ in missing_fields(trajectory, whole)), None)
        steps = [min(cut, len(chat.actions) - 1) for cut in cuts]
        if incomplete is not None:
            steps.append(incomplete)
        seen_steps = dict.fromkeys(steps if closely else [0])
        for step in dict.fromkeys([*seen_steps, *steps]):
            position = chat.actions[step] if chat.actions else 0
            if position > 0 and step in seen_steps:
                seen = self._render(chat, position, prompt=True)
                if not text.startswith(seen.text):
                    return f"before step {step}"
            if step not in steps:
                continue
            if chat.actions and position + 1 < len(chat.messages):
                wrote = self._turn(chat, step)
                if not text.startswith(wrote.rendering.text[: wrote.spans[0][2]]):
                    return f"up to the end of step {step}"
        return None

    def _per_step(self, chat: _Chat) -> list[Conversation]:
        sequences: list[Conversation] = []
        for step, position in enumerate(chat.actions):
            wrote = self._turn(chat, step)
            if position > 0:
                wrote = put_behind(self._render(chat, position, prompt=True), wrote, position)
            last = sequences[-1] if sequences else None
            start = wrote.spans[0][1]
            if last is not None and last.spans[-1][2] <= start:
                held = last.rendering.text[: last.spans[-1][2]]
                if wrote.rendering.text.startswith(held):
                    sequences[-1] = joined(self._continued(chat, last, wrote.rendering), wrote)
                    continue
            sequences.append(wrote)
        if len(sequences) == 1:
            whole = self._whole(chat)
            (only,) = sequences
            held = only.rendering.text[: only.spans[-1][2]]
            again = self._continued(chat, only, whole.rendering)
            if whole.rendering.text.startswith(held) and whole.spans == again.spans:
                return [whole]
        return sequences

    def _continued(self, chat: _Chat, held: Conversation, rendering: Rendering) -> Conversation:
        """Return a sequence's steps in a rendering that goes on behind them.

        Where turns have no end of their own, the next turn's first token is now theirs.
        """
        if self.form.endings:
            return held
        steps = {step: chat.actions[step] for step, _, _ in held.spans}
        return conversation_of(self.form, rendering, chat.messages, steps)


def _refuse_answers(messages: list[dict[str, Any]], actions: list[int]) -> None:
    for position in actions:
        following = messages[position + 1 : position + 2]
        if messages[position].get("tool_calls") and following and following[0]["role"] == "tool":
            raise FormatError(
                f"message {position}: the chat template writes what the tool answered inside the "
                "agent's turn, so that the turn has no single span"
            )


def _num_characters(conversations: Sequence[Conversation]) -> int:
    return sum(len(each.rendering.text) for each in conversations)
