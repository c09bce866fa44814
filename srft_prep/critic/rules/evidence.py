"""A trajectory -> what rules look at: each step's calls, its result and the files it touched.

Everything here is read off the messages; nothing is executed and nothing of the outcome is known
unless the caller asks for it. Long texts are searched with `str.find` and patterns without
backtracking, and return codes only in the first and last characters of an observation, so the cost
is linear in the text with a small constant (a 2 MB observation takes milliseconds).
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Final

from srft_prep.critic.rules import effects
from srft_prep.critic.rules.calls import Call, calls_of
from srft_prep.critic.rules.effects import Effect, strongest
from srft_prep.critic.rules.shell import Command
from srft_prep.types import Message, Step, Trajectory

_HEAD_CHARS: Final = 4_000
_TAIL_CHARS: Final = 1_000
_QUOTE_CHARS: Final = 160

_PREFIX: Final = re.compile(
    r"\s*(?:OBSERVATION:|Observation:|EXECUTION RESULT of \[[^\]\n]*\]:)\s?"
)
_SWE_AGENT_TAIL: Final = re.compile(r"\(Open file: ([^)\n]*)\)\s*\(Current directory: [^)\n]*\)")
_RETURN_CODES: Final = (
    re.compile(r"<returncode>\s*(-?\d{1,4})"),
    re.compile(r"\[(?:The )?[Cc]ommand (?:finished|completed) with exit code (-?\d{1,4})"),
    re.compile(r"\bexit_?code['\"]?\s*[:=]\s*(-?\d{1,4})"),
    re.compile(r"'returncode': (-?\d{1,4})"),
)
_VOLATILE: Final = re.compile(
    r"0x[0-9a-fA-F]+|\b\d+\.\d+ ?(?:s|ms|sec|seconds)\b|\b\d\d:\d\d:\d\d(?:[.,]\d+)?"
)


@dataclass(frozen=True, kw_only=True)
class StepEvidence:
    """One step as rules see it."""

    index: int
    """0-based position among the trajectory's steps."""
    action: Message
    calls: tuple[Call, ...]
    results: tuple[str, ...]
    """The text of each observation, without the harness's wrapping at its start."""

    @cached_property
    def output(self) -> str:
        """All observations in one text."""
        return "\n".join(self.results)

    @property
    def answered(self) -> bool:
        """Whether anything came back."""
        return bool(self.results)

    @cached_property
    def key(self) -> str:
        """What was done, without the thought: two steps with one key did the same."""
        if self.calls:
            return "\n".join(f"{call.name}\n{call.text}" for call in self.calls)
        return (self.action.content or "").strip()

    @cached_property
    def output_digest(self) -> bytes:
        """Digest of the output without addresses, durations and times of day."""
        text = _VOLATILE.sub("#", self.output).strip()
        return hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=16).digest()

    @cached_property
    def returncode(self) -> int | None:
        """The exit status that the observation shows; None where it shows none."""
        for result in self.results:
            for text in (result[:_HEAD_CHARS], result[-_TAIL_CHARS:]):
                for pattern in _RETURN_CODES:
                    if match := pattern.search(text):
                        return int(match[1])
        return None

    @cached_property
    def effect(self) -> Effect:
        """Whether the step changes files, if it succeeds."""
        return strongest(call.effect for call in self.calls)

    @cached_property
    def open_file(self) -> str | None:
        """The file that SWE-agent's prompt says is open after the step."""
        match = _SWE_AGENT_TAIL.search(self.output[-_TAIL_CHARS:])
        return match[1] if match and match[1] != "n/a" else None

    @cached_property
    def writes(self) -> tuple[str, ...]:
        """Files that the step wrote, as far as it names them."""
        paths: list[str] = []
        for call in self.calls:
            if call.kind in ("edit", "create"):
                path = call.path or self.open_file
                paths += [path] if path else []
            for command in call.commands:
                paths += effects.written_files(command)
        return tuple(dict.fromkeys(paths))

    @cached_property
    def touches(self) -> tuple[str, ...] | None:
        """Files that the step may have changed; None where it may have changed any."""
        paths: list[str] = [*self.writes, *self.removes, *self.restores]
        for call in self.calls:
            named = call.path or self.open_file
            if call.kind == "undo" and named:
                paths.append(named)
            elif call.effect != "reads" and not call.commands and not named:
                return None
            for command in call.commands:
                effect = effects.effect_of(command)
                if effect == "may write" or (effect == "writes" and not _names_files(command)):
                    return None
        return None if "." in paths else tuple(paths)

    @cached_property
    def removes(self) -> tuple[str, ...]:
        """Files that the step removed."""
        commands = (command for call in self.calls for command in call.commands)
        return tuple(path for command in commands for path in effects.removed_files(command))

    @cached_property
    def restores(self) -> tuple[str, ...]:
        """Files that the step put back to their committed state; `.` for all of them."""
        commands = (command for call in self.calls for command in call.commands)
        return tuple(path for command in commands for path in effects.restored_files(command))

    @cached_property
    def reads(self) -> tuple[str, ...]:
        """Files that the step shows, where it does nothing else."""
        if len(self.calls) != 1:
            return ()
        call = self.calls[0]
        if call.kind == "view":
            path = call.path or self.open_file
            return (path,) if path else ()
        return (effects.read_files(call.commands) or ()) if call.kind == "shell" else ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A trajectory as rules see it."""

    steps: tuple[StepEvidence, ...]
    prompt: str
    """What the agent was told before its first action."""
    resolved: bool | None = field(default=None)
    """The outcome; None unless the caller chose to tell."""


def run_of(trajectory: Trajectory, *, use_outcome: bool = False) -> Run:
    """Return the evidence of a trajectory."""
    prompt = [message.content or "" for message in trajectory.messages if message.kind == "prompt"]
    steps = trajectory.steps if trajectory.num_steps else ()
    return Run(
        steps=tuple(_evidence(step) for step in steps),
        prompt="\n".join(prompt),
        resolved=trajectory.resolved if use_outcome else None,
    )


def line_with(text: str, marks: Sequence[str], *, chars: int | None = None) -> str | None:
    """Return the first line of `text` that starts with one of the marks, for quoting.

    Args:
        text: where to look.
        marks: starts of lines.
        chars: look only at that many characters; None for all.
    """
    if chars is not None:
        text = text[:chars]
    found = [at for mark in marks if (at := _line_start(text, mark)) >= 0]
    return quote(text[min(found) :]) if found else None


def quote(text: str) -> str:
    """Return the first line of a text, clipped."""
    line = text.lstrip()[: 2 * _QUOTE_CHARS].split("\n", 1)[0].strip()
    return line if len(line) <= _QUOTE_CHARS else line[: _QUOTE_CHARS - 1] + "…"


def same_file(one: str, other: str) -> bool:
    """Return whether two paths may name one file: equal, or one is the other's tail."""
    one, other = one.removeprefix("./"), other.removeprefix("./")
    return one == other or one.endswith("/" + other) or other.endswith("/" + one)


def _evidence(step: Step) -> StepEvidence:
    return StepEvidence(
        index=step.index,
        action=step.action,
        calls=calls_of(step.action),
        results=tuple(_unwrapped(message.content or "") for message in step.observations),
    )


def _names_files(command: Command) -> bool:
    if command.name in ("mkdir", "rmdir", "chmod"):
        return True
    return bool(
        effects.written_files(command)
        or effects.removed_files(command)
        or effects.restored_files(command)
    )


def _unwrapped(text: str) -> str:
    match = _PREFIX.match(text)
    return (text[match.end() :] if match else text).replace("\r\n", "\n")


def _line_start(text: str, mark: str) -> int:
    if text.startswith(mark):
        return 0
    at = text.find("\n" + mark)
    return at + 1 if at >= 0 else -1
