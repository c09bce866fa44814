"""How a template writes assistant turns, learnt from small conversations before any real one.

The texts of the probes are ours and begin with different letters, so that what all turns have in
common is the template's. A probe that the template refuses teaches nothing; a template that refuses
all of them, or that shows nothing of what an assistant says, cannot be used.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain, takewhile
from typing import Any, Final

from srft_prep.errors import ConfigError, FormatError
from srft_prep.render import ChatTemplate, Rendering
from srft_prep.turns import Ending, TurnForm, as_parts

_Message = dict[str, Any]

_SAID: Final = ("Ab1 one", "Zk9 two")
_INLINE: Final = ("Cd5 so</think> Ab1", "Xj6 go</think> Zk9")
"""Some templates leave away their own thinking tags where a message has some."""
_THINKING_TAG: Final = "<think>"
_THOUGHT: Final = ("Bq3 hm", "Yw5 so")
_ANSWER: Final = "Tv6 out"
_NAME: Final = "Fn8call"
_CALLS: Final = [
    {"id": "abcdefgh1", "type": "function", "function": {"name": _NAME, "arguments": {"c": "ls"}}}
]
_TEXT_CALLS: Final = [
    {**_CALLS[0], "function": {"name": _NAME, "arguments": '{"c": "ls"}'}}  # for older templates
]
_TOOLS: Final = [
    {
        "type": "function",
        "function": {
            "name": _NAME,
            "description": "run",
            "parameters": {
                "type": "object",
                "properties": {"c": {"type": "string", "description": "a command"}},
                "required": ["c"],
            },
        },
    }
]
_SYSTEM: Final[_Message] = {"role": "system", "content": "Sy4 be good"}
_USER: Final[_Message] = {"role": "user", "content": "Qu7 go"}
_TOOL: Final[_Message] = {
    "role": "tool",
    "content": _ANSWER,
    "tool_call_id": "abcdefgh1",
    "name": _NAME,
}
_PLAIN: Final[_Message] = {"role": "assistant", "content": _SAID[0]}
_CALLING: Final[_Message] = {**_PLAIN, "tool_calls": _CALLS}
_CALL_TURNS: Final[tuple[_Message, ...]] = (
    _CALLING,
    {"role": "assistant", "tool_calls": _CALLS},
    {**_PLAIN, "tool_calls": _TEXT_CALLS},
)

_BEFORE: Final[dict[str, tuple[list[_Message], ...]]] = {
    "user": ([_USER], [_SYSTEM, _USER], [_USER, _PLAIN, _USER]),
    "tool": tuple(
        [*head, call, _TOOL] for call in _CALL_TURNS for head in ([_USER], [_SYSTEM, _USER])
    ),
    "assistant": ([_USER, _PLAIN], [_SYSTEM, _USER, _PLAIN]),
    "system": ([_SYSTEM], [_USER, _SYSTEM], [_USER, _PLAIN, _SYSTEM]),
}
_AFTER: Final[tuple[list[_Message], ...]] = ([], [_USER], [_TOOL])


@dataclass(slots=True)
class _Learnt:
    template: ChatTemplate
    content_is_parts: bool = False
    prompt: str | None = None
    headers: dict[str, set[str]] = field(default_factory=dict)
    endings: set[tuple[str, int]] = field(default_factory=set)
    openers: set[str] = field(default_factory=set)
    closers: set[str] = field(default_factory=lambda: {""})
    answers_inside: bool = False
    shows_calls: bool = False
    has_ends: bool = False
    saw_turn: bool = False
    reason: str = ""

    def render(self, messages: list[_Message], *, prompt: bool = False) -> Rendering | None:
        if self.content_is_parts:
            messages = as_parts(messages)
        for tools in (None, _TOOLS):  # some templates cannot do without
            try:
                return self.template.render(messages, tools, add_generation_prompt=prompt)
            except FormatError as error:
                self.reason = str(error)
        return None


def learn_turns(template: ChatTemplate) -> TurnForm:
    """Return how a template writes assistant turns.

    Raises:
        ConfigError: the template refuses every probe, or shows nothing of what an assistant says.
    """
    learnt = _Learnt(template)
    _learn(learnt)
    if not learnt.headers:
        refused = learnt.reason
        learnt = _Learnt(template, content_is_parts=True)
        _learn(learnt)
        if not learnt.headers:
            raise ConfigError(
                "the chat template cannot be used: " + (refused or _silence(learnt.saw_turn))
            )
    headers = {role: _longest_first(each) for role, each in learnt.headers.items()}
    return TurnForm(
        header=learnt.prompt or "",
        headers={**headers, "": _longest_first(set(chain(*headers.values())))},
        endings=tuple(
            Ending(text=text, token=token)
            for text, token in sorted(learnt.endings, key=lambda each: (-len(each[0]), each))
        ),
        openers=_longest_first(learnt.openers),
        closers=_longest_first(learnt.closers),
        content_is_parts=learnt.content_is_parts,
        answers_inside=learnt.answers_inside,
        shows_calls=learnt.shows_calls,
        control_tokens=template.control_tokens,
    )


def _silence(saw_turn: bool) -> str:
    if saw_turn:
        return "it shows nothing of what an assistant says"
    return "it has no loop over messages that writes an assistant's turn"


def _longest_first(texts: set[str]) -> tuple[str, ...]:
    return tuple(sorted(texts, key=lambda text: (-len(text), text)))


def _learn(learnt: _Learnt) -> None:
    for role, befores in _BEFORE.items():
        for before in befores:
            given = _given(learnt, before)
            if given is None:
                continue
            if role == "user" and learnt.prompt is None:
                learnt.prompt = given[-1]
            _learn_plain(learnt, role, before, given)
    learnt.has_ends = bool(learnt.endings)
    for role, befores in _BEFORE.items():
        for before in befores:
            given = _given(learnt, before)
            for after in _AFTER if given is not None else ():
                _learn_calls(learnt, role, before, after)


def _given(learnt: _Learnt, before: list[_Message]) -> tuple[str, ...] | None:
    """Return what the template may give to the model behind some messages, the most first.

    That is all that it writes behind the last message, or only what `add_generation_prompt` adds.
    """
    asked = learnt.render(before, prompt=True)
    if asked is None or not asked.segments:
        return None
    tail = asked.text[max(end for _, end in asked.segments.values()) :]
    plain = learnt.render(before)
    added = asked.text.removeprefix(plain.text) if plain is not None else ""
    return (tail, added) if 0 < len(added) < len(tail) else (tail,)


def _segment(rendering: Rendering | None, index: int) -> str:
    if rendering is None:
        return ""
    start, end = rendering.segments.get(index, (0, 0))
    return rendering.text[start:end]


def _learn_plain(
    learnt: _Learnt, role: str, before: list[_Message], given: tuple[str, ...]
) -> None:
    """Learn from turns of text, with and without reasoning, at the end and followed by more."""
    pairs = []
    inline = []
    for after in _AFTER:
        pairs += _said_pairs(learnt, before, after, with_thoughts=False)
        pairs += _said_pairs(learnt, before, after, with_thoughts=True)
        inline += _said_pairs(learnt, before, after, with_thoughts=False, said=_INLINE)
    if not pairs:
        return
    everything = list(chain(*pairs, *inline))
    wholes = [_whole(given, pair) for pair in (*pairs, *inline)]
    common = "" if None not in wholes else _common(learnt, given, everything)
    headers = [common if whole is None else whole for whole in wholes]
    learnt.headers.setdefault(role, set()).update(headers)
    for pair, header in zip(pairs, headers, strict=False):
        _learn_places(learnt, pair[0], header)


def _said_pairs(
    learnt: _Learnt,
    before: list[_Message],
    after: list[_Message],
    *,
    with_thoughts: bool,
    said: tuple[str, str] = _SAID,
) -> list[list[str]]:
    """Return two renderings of a turn that differ in all that the assistant says, or none."""
    pair = []
    for text, thought in zip(said, _THOUGHT, strict=True):
        message = {"role": "assistant", "content": text}
        if with_thoughts:
            message["reasoning_content"] = thought
        segment = _segment(learnt.render([*before, message, *after]), len(before))
        learnt.saw_turn |= bool(segment)
        if text in segment:
            pair.append(segment)
    return [pair] if len(pair) == 2 else []


def _whole(given: tuple[str, ...], segments: list[str]) -> str | None:
    """Return the prompt with which turns begin, None where they begin otherwise."""
    return next((each for each in given if all(s.startswith(each) for s in segments)), None)


def _common(learnt: _Learnt, given: tuple[str, ...], segments: list[str]) -> str:
    """Return the part of the prompt with which all turns begin; it ends within no control token.

    Where the prompt's end is not kept, a thinking tag in it was not what the turn answers to.
    """
    found = ""
    for each in given:
        common = _shared([each.partition(_THINKING_TAG)[0], *segments])
        for match in learnt.template.control_tokens.finditer(each):
            if match.start() < len(common) < match.end():
                common = common[: match.start()]
        found = max(found, common, key=len)
    return found


def _learn_places(learnt: _Learnt, segment: str, header: str) -> None:
    behind = segment[segment.rindex(_SAID[0]) + len(_SAID[0]) :]
    tokens = list(learnt.template.control_tokens.finditer(behind))
    if tokens:
        first = last = len(tokens) - 1
        while first and tokens[first - 1].end() == tokens[first].start():
            first -= 1
        start, end = tokens[first].start(), tokens[last].end()
    else:
        start, end = 0, len(behind.rstrip())
    if end:
        learnt.endings.add((behind[start:], end - start))
    learnt.closers.add(behind[:start].strip() if end else "")
    if _THOUGHT[0] in segment:
        learnt.openers.add(segment[len(header) : segment.index(_THOUGHT[0])])


def _learn_calls(learnt: _Learnt, role: str, before: list[_Message], after: list[_Message]) -> None:
    """Learn from turns with a tool call.

    Such a turn may lack a header that turns of text have after the same role; it never teaches a
    new one, since what it begins with is a word of the template, which may look like the prompt.
    """
    known = _longest_first(learnt.headers.get(role, set()))
    for message in _calling_turns():
        index = len(before)
        rendering = learnt.render([*before, message, *after])
        segment = _segment(rendering, index)
        if rendering is None or not segment:
            continue
        if _ANSWER in segment:
            learnt.answers_inside = True
            continue
        learnt.shows_calls |= _NAME in segment
        begun = rendering.segments[index][0]
        header = next((each for each in known if segment.startswith(each)), None)
        if known and header is None and not _shared([known[0], segment]):
            learnt.headers[role].add("")
            header = ""
        calls = rendering.calls.get(index)
        if header is None or calls is None:
            continue
        _learn_call_places(learnt, segment, header, calls - begun)


def _learn_call_places(learnt: _Learnt, segment: str, header: str, calls: int) -> None:
    tokens = list(learnt.template.control_tokens.finditer(segment, max(calls, len(header))))
    if tokens and learnt.has_ends:
        learnt.endings.add((segment[tokens[-1].start() :], len(tokens[-1][0])))
    thought = segment[len(header) : calls]
    if _SAID[0] in thought:
        learnt.closers.add(thought[thought.rindex(_SAID[0]) + len(_SAID[0]) :].strip())
    if _THOUGHT[0] in thought:
        learnt.openers.add(thought[: thought.index(_THOUGHT[0])])


def _calling_turns() -> Iterator[_Message]:
    for message in _CALL_TURNS:
        yield message
        yield {**message, "reasoning_content": _THOUGHT[0]}


def _shared(texts: list[str]) -> str:
    """Return what all texts begin with."""
    same = takewhile(lambda each: len(set(each)) == 1, zip(*texts, strict=False))
    return "".join(each[0] for each in same)
