"""OpenHands' events -> the conversation that the model had.

A run is recorded as events (actions and observations), not as messages. This module does again what
OpenHands did before each call:

- One model response is one step, however many calls it holds: `tool_call_metadata` carries the
  response with each of its actions and observations, and its assistant message is the action.
- Where an event carries no response, the action's text is built anew (`openhands_text`), and the
  answers to it are user messages.
- What the model saw is an observation: outputs, errors, the (simulated) user's replies.
- What it never saw is left out: changes of state, null observations, and recall. Recall lists the
  microagents that a keyword triggered; evaluation does not show them, and the prompt tokens that
  the provider counted in our samples leave no room for them. An interactive session may have.

A response that OpenHands could not parse is in no event; only the error that answered it is. A
condenser's cuts in the history are not replayed: the messages are the whole run.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from dataclasses import field as factory_field
from typing import Any, Final

import orjson

from srft_prep.errors import FormatError
from srft_prep.readers.conversation import chat_message
from srft_prep.readers.fields import field, tools_json
from srft_prep.readers.openhands_text import Form, action_text, answered, form_of, observation_text
from srft_prep.types import Kind, Message

_NOT_BY_MODEL: Final = (
    "change_agent_state",
    "condensation",
    "condensation_request",
    "loop_recovery",
    "null",
    "pause",
    "recall",
    "resume",
    "start",
    "stop",
)
"""Actions under the agent's name that the program took itself, unless a call asked for them."""

_UNSEEN: Final = ("agent_state_changed", "loop_detection", "null", "recall")
"""Observations that no model saw."""


@dataclass(slots=True, kw_only=True)
class Conversation:
    """What the events of one run say, as far as they are read."""

    messages: list[Message] = factory_field(default_factory=list)
    tools: str | None = None
    """The system event's tool definitions, as JSON."""
    model: str | None = None
    """The model that the first response names."""
    last_action: str | None = None
    """Name of the agent's last action: `finish` where it ended the run itself."""
    kind: Kind = "prompt"
    """Kind of the next message that no model wrote: `observation` after the first action."""
    responses: set[str] = factory_field(default_factory=set)
    """Ids of the responses that are already a step."""
    calls: set[str] = factory_field(default_factory=set)
    """Ids of the calls that the messages hold."""
    form: Form | None = None
    """Form of the last call if its text was built anew, None after a recorded response."""

    def add(self, *, role: str, content: str) -> None:
        """Append a message that no model wrote."""
        self.messages.append(Message(role=role, kind=self.kind, content=content))

    def add_action(self, message: Message) -> None:
        """Append a step's message."""
        self.messages.append(message)
        self.kind = "observation"

    def prompt(self) -> str:
        """Return all that the model was told before its first action."""
        return "\n".join(m.content or "" for m in self.messages if m.kind == "prompt")


def is_event(value: Any) -> bool:
    """Return whether a value looks like an event, or like an old pair of events."""
    if isinstance(value, list):
        return len(value) == 2 and all(isinstance(e, dict) and is_event(e) for e in value)
    if not isinstance(value, dict) or "role" in value:
        return False
    # A step of SWE-agent's has both.
    return isinstance(value.get("action"), str) != isinstance(value.get("observation"), str)


def conversation_of_events(events: list[Any], *, max_chars: int | None) -> Conversation:
    """Return the conversation that a run's events record, in their order.

    `max_chars` is the longest observation that the model was shown, in characters.

    Raises:
        FormatError: an event is broken.
    """
    conversation = Conversation()
    for where, event in _flat(events):
        action = field(event, "action", str, where=where)
        observation = field(event, "observation", str, where=where)
        if action is not None:
            _add_action(conversation, event, action, where=where)
        elif observation is None:
            raise FormatError(f"{where}: expected an action or an observation, got neither")
        elif observation not in _UNSEEN:
            text = observation_text(event, observation, max_chars=max_chars, where=where)
            _add_observation(conversation, event, observation, text=text, where=where)
    return conversation


def _flat(events: list[Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, item in enumerate(events):
        for place, event in enumerate(item if isinstance(item, list) else [item]):
            where = f"event {number}.{place}" if isinstance(item, list) else f"event {number}"
            if not isinstance(event, dict):
                raise FormatError(f"{where}: expected an object, got {type(event).__name__}")
            yield where, event


def _add_action(
    conversation: Conversation, event: dict[str, Any], action: str, *, where: str
) -> None:
    source = field(event, "source", str, where=where)
    args = field(event, "args", dict, where=where)
    args = event if args is None else args  # Old events have no `args`: arguments lie flat.
    if action == "system":
        conversation.tools = tools_json(args.get("tools"), where=where) or conversation.tools
        content = field(args, "content", str, where=where) or ""
        conversation.messages.append(Message(role="system", kind="prompt", content=content))
    elif _is_users(conversation, action, source=source):
        # Of the user's other actions (recall, state changes) the model saw nothing.
        if action == "message":
            text = field(args, "content", str, where=where) or ""
            conversation.add(role="user", content=text)
        elif action == "run":
            command = field(args, "command", str, where=where) or ""
            conversation.add(role="user", content=f"User executed the command:\n{command}")
    elif source != "environment" and (
        action not in _NOT_BY_MODEL or event.get("tool_call_metadata") is not None
    ):
        conversation.last_action = action
        _add_step(conversation, event, action, args=args, where=where)


def _is_users(conversation: Conversation, action: str, *, source: str | None) -> bool:
    """Return whether the user took an action.

    Old events name no source. The first message is the task then, and a message straight after the
    agent's own message is the reply to it.
    """
    if source is not None or action != "message":
        return source == "user"
    return not conversation.messages or conversation.messages[-1].role in ("system", "assistant")


def _add_step(
    conversation: Conversation,
    event: dict[str, Any],
    action: str,
    *,
    args: dict[str, Any],
    where: str,
) -> None:
    metadata = field(event, "tool_call_metadata", dict, where=where) or {}
    response = field(metadata, "model_response", dict, where=where) or {}
    conversation.model = conversation.model or field(response, "model", str, where=where)
    raw = _message_of(response, where=where)
    if raw is None:
        prompt = conversation.prompt()
        text = action_text(action, args, prompt=prompt, where=where)
        conversation.add_action(Message(role="assistant", kind="action", content=text))
        if action != "message":
            conversation.form = form_of(prompt)
        return
    conversation.form = None
    response_id = field(response, "id", str, where=where)
    if response_id:
        if response_id in conversation.responses:
            return
        conversation.responses.add(response_id)
    message = chat_message(raw, kind="action", where=where, role="assistant")
    if message.content is None and message.tool_calls is None:
        message = message._replace(content="")
    conversation.calls.update(_call_ids(message))
    conversation.add_action(message)


def _message_of(response: dict[str, Any], *, where: str) -> dict[str, Any] | None:
    """Return the assistant message of a recorded response, None where it is not recorded."""
    choices = field(response, "choices", list, where=where)
    if not choices:
        return None
    if not isinstance(choices[0], dict):
        raise FormatError(f"{where}: choices: expected objects, got {type(choices[0]).__name__}")
    message: dict[str, Any] | None = field(choices[0], "message", dict, where=where)
    return message


def _call_ids(message: Message) -> list[str]:
    calls = orjson.loads(message.tool_calls) if message.tool_calls else []
    return [call["id"] for call in calls if isinstance(call.get("id"), str)]


def _add_observation(
    conversation: Conversation, event: dict[str, Any], observation: str, *, text: str, where: str
) -> None:
    metadata = field(event, "tool_call_metadata", dict, where=where) or {}
    call_id = field(metadata, "tool_call_id", str, where=where)
    name = field(metadata, "function_name", str, where=where)
    if call_id is not None and call_id in conversation.calls:
        tool = Message(
            role="tool", kind=conversation.kind, content=text, tool_call_id=call_id, name=name
        )
        conversation.messages.append(tool)
        return
    if field(event, "source", str, where=where) == "user" and observation == "run":
        text = f"\nObserved result of command executed by user:\n{text}"
    elif conversation.form is not None:
        text = answered(text, form=conversation.form, tool=name, observation=observation)
    conversation.add(role="user", content=text)
