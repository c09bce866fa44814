"""What a template did to the user's data, in numbers and in sentences."""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Final

from srft_prep.types import Trajectory

if TYPE_CHECKING:
    from srft_prep.conversations import Conversation

_SENTENCES: Final = {
    "dropped_content": "{n} of {steps} steps lost their content: the chat template leaves it out",
    "dropped_reasoning_content": (
        "{n} of {steps} steps lost their reasoning: the chat template leaves it out"
    ),
    "dropped_tool_calls": (
        "{n} of {steps} steps lost their tool calls: the chat template leaves them out"
    ),
    "dropped_answers": "{n} answers of tools are left out by the chat template",
    "unplaced_content": (
        "{n} of {steps} steps have their content at no place of their own (the chat template "
        "changes it): character weights cannot reach it"
    ),
    "unplaced_reasoning_content": (
        "{n} of {steps} steps have their reasoning at no place of its own (the chat template "
        "changes it): character weights cannot reach it"
    ),
    "unplaced_tool_calls": (
        "{n} of {steps} steps have tool calls whose beginning the chat template hides: weights of "
        "parts cannot be used for them"
    ),
    "no_end_of_turn": (
        "{n} of {steps} steps end without a control token: nothing teaches the model to stop there"
    ),
}


def count_findings(trajectory: Trajectory, conversation: "Conversation") -> Counter[str]:
    """Count the steps of a conversation by what the template did to them.

    `dropped_FIELD`: the field is not in the step's text. `unplaced_FIELD`: it is somewhere there,
    but not where it can be told apart from text that looks the same.
    """
    counts: Counter[str] = Counter()
    ended = {step for step, part, _, _ in conversation.parts if part == "end_of_turn"}
    known = {step for step, _, _, _ in conversation.parts}
    for step, name in missing_fields(trajectory, conversation):
        if name == "tool_calls":
            is_written = step not in known
        else:
            said = str(getattr(trajectory.actions[step], name)).strip()
            is_written = said in _text_of(conversation, step)
        counts[f"{'unplaced' if is_written else 'dropped'}_{name}"] += 1
    counts["no_end_of_turn"] += len(known - ended)
    counts["dropped_answers"] += conversation.num_dropped_answers
    return +counts


def missing_fields(
    trajectory: Trajectory, conversation: "Conversation"
) -> Iterator[tuple[int, str]]:
    """Yield (step, field) for every field of an action that has no place in its step."""
    placed = {(step, name) for step, name, *_ in conversation.fields}
    called = {step for step, part, _, _ in conversation.parts if part == "tool_call"}
    for step, _, _ in conversation.spans:
        action = trajectory.actions[step]
        for name in ("content", "reasoning_content"):
            value = getattr(action, name)
            if value and (step, name) not in placed and not value.isspace():
                yield step, name
        if action.tool_calls is not None and step not in called and action.tool_calls != "[]":
            yield step, "tool_calls"


def _text_of(conversation: "Conversation", step: int) -> str:
    return next(
        conversation.rendering.text[start:end]
        for each, start, end in conversation.spans
        if each == step
    )


def describe_findings(counts: Mapping[str, int], *, num_steps: int) -> list[str]:
    """Return a sentence for each finding."""
    return [
        sentence.format(n=counts[name], steps=num_steps)
        for name, sentence in _SENTENCES.items()
        if counts.get(name)
    ]
