"""The words of the house as types: message, step, trajectory, label.

A step is a message of kind `action` with the observations that answer it; steps are numbered from
0 in the order of their actions. Everything else in a trajectory is context: it is shown to the
student and never carries weight.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Final, Literal, NamedTuple, get_args

import orjson

Label = Literal["good", "unnecessary", "harmful"]
LABELS: Final[tuple[Label, ...]] = get_args(Label)

Kind = Literal["prompt", "action", "observation", "demo", "artifact"]
KINDS: Final[tuple[Kind, ...]] = get_args(Kind)

CHAT_ROLES: Final = ("system", "user", "assistant", "tool")
"""Roles that chat templates know; a message with another role (`exit`) is never rendered."""


class Message(NamedTuple):
    """One message of a conversation, as the student would see it.

    A tuple and no dataclass: millions are made, and a frozen dataclass takes eight times as long.
    """

    role: str
    """`system`, `user`, `assistant`, `tool`, or a harness's own role, which is never rendered."""
    kind: Kind
    """What the message is: only `action` can carry weight."""
    content: str | None = None
    """Visible text; None where the model wrote a tool call and nothing beside it."""
    reasoning_content: str | None = None
    """Thoughts that the provider returned apart from the content."""
    tool_calls: str | None = None
    """JSON list of calls in OpenAI's form, as emitted (arguments stay a JSON string)."""
    tool_call_id: str | None = None
    """The call that a `tool` message answers."""
    name: str | None = None
    """The tool's or the speaker's name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One action of the agent and the observations that came back."""

    index: int
    """0-based position among the trajectory's steps."""
    action: Message
    observations: tuple[Message, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """One attempt at a task."""

    trajectory_id: str
    """Unique within a stage directory."""
    instance_id: str
    """The task, e.g. a SWE-bench instance; empty where the source names none."""
    format: str
    """The reader that produced it."""
    messages: tuple[Message, ...]
    resolved: bool | None = None
    """Whether the attempt solved its task; None where nobody knows."""
    model: str | None = None
    exit_status: str | None = None
    patch: str | None = None
    """The final diff, where the run recorded one."""
    tools: str | None = None
    """JSON list of the tool definitions that the model was given."""

    @cached_property
    def steps(self) -> tuple[Step, ...]:
        """The trajectory's steps in order; an observation belongs to the last action before it."""
        starts = [i for i, message in enumerate(self.messages) if message.kind == "action"]
        return tuple(
            Step(
                index=index,
                action=self.messages[start],
                observations=tuple(
                    message
                    for message in self.messages[start + 1 : end]
                    if message.kind == "observation"
                ),
            )
            for index, (start, end) in enumerate(pairwise([*starts, len(self.messages)]))
        )

    @cached_property
    def actions(self) -> tuple[Message, ...]:
        """The messages of kind `action`: that of step t is the t-th."""
        return tuple(message for message in self.messages if message.kind == "action")

    @property
    def num_steps(self) -> int:
        """Number of messages of kind `action`."""
        return len(self.actions)

    @cached_property
    def content_hash(self) -> str:
        """Hash of all that a critic or a student sees: messages and tools, in hex (128 bits).

        The outcome, the patch and the ids are left out, so that joining a report later changes no
        key of the ledger and two copies of one run under two names are known as duplicates.
        """
        rows: list[Sequence[str | None]] = [
            (
                message.role,
                message.kind,
                message.content,
                message.reasoning_content,
                message.tool_calls,
                message.tool_call_id,
                message.name,
            )
            for message in self.messages
        ]
        return hashlib.blake2b(orjson.dumps([self.tools, rows]), digest_size=16).hexdigest()
