"""Messages -> chat text, with the place of every action known from the rendering itself.

The template is compiled once more with marks: its own syntax tree gets an output statement at the
head of each loop over the messages, and one behind the loop. A mark is a private-use character
that occurs nowhere in the conversation, so that the marks can be taken out again and leave the
exact text that `apply_chat_template` gives. What lies between a message's mark and the next is
that message's rendering; no message text is ever searched for.

An action's span runs from behind the assistant header, which is what `add_generation_prompt`
writes, to the end of the last control token of its rendering, the end of turn. The agent wrote
neither the header nor what follows the end of turn (a newline, in ChatML).

Control tokens inside a message (`<|im_end|>` in a file that the agent printed) are wrapped in two
further marks before rendering, so that they can be told from the template's own. They are encoded
as plain text, piece by piece, as transformers' `sanitize_control_tokens` does.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import jinja2
import orjson
from jinja2 import nodes

from srft_prep.errors import ConfigError, FormatError
from srft_prep.types import CHAT_ROLES, Trajectory

_PRIVATE_USE: Final = range(0xF0000, 0xFFFFE)
_MARK_FUNCTION: Final = "srft_prep_mark"
_REFUSALS: Final = (
    *(jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError),
    RecursionError,  # arguments nested too deeply
)
"""What a template may raise on a conversation that it cannot render."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendering:
    """One conversation as chat text."""

    text: str
    """The text, free of marks."""
    segments: dict[int, tuple[int, int]]
    """Message index -> the half-open character range of the message's rendering."""
    forged: tuple[tuple[int, int], ...]
    """Character ranges of control tokens that a message holds as text, in order."""
    calls: dict[int, int] = field(default_factory=dict)
    """Message index -> the character where its tool calls' rendering begins; absent if none."""
    generation: tuple[tuple[int, int], ...] = ()
    """Character ranges of the template's `{% generation %}` blocks, in order."""


class ChatTemplate:
    """A chat template, ready to render conversations with marks."""

    def __init__(
        self, source: str, *, variables: Mapping[str, Any], control_tokens: Sequence[str]
    ) -> None:
        """Compile a template.

        Args:
            source: the Jinja text.
            variables: what templates may use: the tokenizer's `special_tokens_map`, and more.
            control_tokens: the tokenizer's special tokens, as text.

        Raises:
            ConfigError: the text is no template, or never loops over `messages`.
        """
        from transformers.utils.chat_template_utils import _compile_jinja_template

        try:
            environment = _compile_jinja_template(source).environment
            marker = _Marker()
            self._template = environment.from_string(marker.visit(environment.parse(source)))
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(
                f"the chat template is broken, line {error.lineno}: {error}"
            ) from None
        if not marker.num_loops:
            raise ConfigError("the chat template has no loop over messages: nothing to train")
        self._variables = variables
        longest_first = sorted(control_tokens, key=len, reverse=True)
        self.control_tokens = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def render(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None,
        *,
        add_generation_prompt: bool = False,
    ) -> Rendering:
        """Return a conversation as text with the places of its messages.

        Raises:
            FormatError: the template refuses the conversation (a role that it does not know, say).
        """
        order: list[int] = []
        try:
            mark, start_forged, end_forged = _unused_characters(messages, tools)
            wrapped = f"{start_forged}\\g<0>{end_forged}"
            marked = [
                _wrap(_with_thinking(message), self.control_tokens, wrapped) for message in messages
            ]
            index_of = {id(message): index for index, message in enumerate(marked)}

            def note(message: object) -> str:
                order.append(index_of.get(id(message), -1))
                return mark

            text = self._template.render(
                **self._variables,
                messages=marked,
                tools=_wrap(tools, self.control_tokens, wrapped) if tools else None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **{_MARK_FUNCTION: note},
            )
        except _REFUSALS as error:
            raise FormatError(f"the chat template refuses the conversation: {error}") from None
        return _unmark(text, mark, start_forged, end_forged, order)

    def generation_prompt(self, messages: list[dict[str, Any]]) -> str:
        """Return the assistant header: what `add_generation_prompt` adds to a conversation.

        Raises:
            ConfigError: the template has no generation prompt.
        """
        without = self.render(messages, None).text
        with_prompt = self.render(messages, None, add_generation_prompt=True).text
        header = with_prompt.removeprefix(without)
        if not header or not with_prompt.startswith(without):
            raise ConfigError("the chat template writes no generation prompt at a prompt's end")
        return header


def template_messages(trajectory: Trajectory) -> tuple[list[dict[str, Any]], list[int]]:
    """Return the messages that a template is given, and each one's index in the trajectory.

    Messages of a role that chat templates do not know (`exit`) are left out. Empty fields are left
    out. Tool arguments that are JSON text of an object are parsed, as inference servers do before
    rendering and as transformers asks for; other arguments stay text.
    """
    messages: list[dict[str, Any]] = []
    indices: list[int] = []
    for index, message in enumerate(trajectory.messages):
        if message.role not in CHAT_ROLES:
            continue
        row: dict[str, Any] = {"role": message.role}
        for name in ("content", "reasoning_content", "tool_call_id", "name"):
            value = getattr(message, name)
            if value is not None:
                row[name] = value
        if message.tool_calls is not None:
            row["tool_calls"] = [_parsed_call(call) for call in orjson.loads(message.tool_calls)]
        messages.append(row)
        indices.append(index)
    return messages, indices


def template_tools(trajectory: Trajectory) -> list[dict[str, Any]] | None:
    """Return the tool definitions that a template is given."""
    return orjson.loads(trajectory.tools) if trajectory.tools else None


def action_span(
    rendering: Rendering, index: int, *, header: str, end: re.Pattern[str]
) -> tuple[int, int]:
    """Return the half-open character range that the agent wrote in one message's rendering.

    Raises:
        FormatError: the rendering does not start with the header, or holds no end of turn.
    """
    start, stop = rendering.segments.get(index, (0, 0))
    segment = rendering.text[start:stop]
    if not segment.startswith(header):
        raise FormatError(
            f"message {index}: the chat template writes an assistant turn that does not start with "
            f"its generation prompt {header!r}, but {segment[: len(header)]!r}"
        )
    forged = set(rendering.forged)
    ends = [
        match.end() + start
        for match in end.finditer(segment, len(header))
        if (match.start() + start, match.end() + start) not in forged
    ]
    if not ends:
        raise FormatError(f"message {index}: the chat template writes no end of turn")
    return start + len(header), ends[-1]


class _Marker(jinja2.visitor.NodeTransformer):
    """Adds the marks: at the head of every loop over messages, and behind it."""

    def __init__(self) -> None:
        self.num_loops = 0

    def visit_For(self, node: nodes.For) -> list[nodes.Node]:
        self.generic_visit(node)
        names = [node.iter, *node.iter.find_all(nodes.Name)]
        over_messages = any(isinstance(n, nodes.Name) and "messages" in n.name for n in names)
        if not over_messages or not isinstance(node.target, nodes.Name):
            return [node]
        self.num_loops += 1
        node.body.insert(0, _mark_output(nodes.Name(node.target.name, "load")))
        return [node, _mark_output(nodes.Const(None))]


def _mark_output(argument: nodes.Expr) -> nodes.Output:
    call = nodes.Call(nodes.Name(_MARK_FUNCTION, "load"), [argument], [], None, None)
    return nodes.Output([call])


def _unused_characters(messages: Any, tools: Any) -> tuple[str, str, str]:
    """Return three private-use characters that occur in none of the strings."""
    text = "".join(_strings([messages, tools]))
    unused = (char for char in map(chr, _PRIVATE_USE) if char not in text)
    return next(unused), next(unused), next(unused)


def _strings(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return [text for pair in value.items() for item in pair for text in _strings(item)]
    if isinstance(value, list):
        return [text for item in value for text in _strings(item)]
    return []


def _with_thinking(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message with its thoughts under the second name, too, as `apply_chat_template` does.

    Templates of gpt-oss and LFM2 read them as `thinking`.
    """
    if "reasoning_content" not in message:
        return message
    return {"thinking": message["reasoning_content"], **message}


def _wrap(value: Any, pattern: re.Pattern[str], replacement: str) -> Any:
    if isinstance(value, str):
        return pattern.sub(replacement, value)
    if isinstance(value, dict):
        return {
            pattern.sub(replacement, key): _wrap(item, pattern, replacement)
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [_wrap(item, pattern, replacement) for item in value]
    return value


def _unmark(
    marked: str, mark: str, start_forged: str, end_forged: str, order: list[int]
) -> Rendering:
    """Take the marks out and note where they were."""
    pieces: list[str] = []
    segments: dict[int, tuple[int, int]] = {}
    forged: list[tuple[int, int]] = []
    position = opened = begun = 0
    current = -1
    marks = iter(order)
    for piece in re.split(f"([{mark}{start_forged}{end_forged}])", marked):
        if piece == mark:
            if current >= 0 and position > begun:
                segments[current] = (begun, position)
            current, begun = next(marks), position
        elif piece == start_forged:
            opened = position
        elif piece == end_forged:
            forged.append((opened, position))
        else:
            pieces.append(piece)
            position += len(piece)
    if current >= 0 and position > begun:
        segments[current] = (begun, position)
    return Rendering(text="".join(pieces), segments=segments, forged=tuple(forged))


def _parsed_call(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            parsed = json.loads(arguments)  # not orjson, which turns long integers into floats
            if isinstance(parsed, dict) and _is_encodable(parsed):
                return {**call, "function": {**function, "arguments": parsed}}
        except (ValueError, RecursionError):
            return call
    return call


def _is_encodable(value: Any) -> bool:
    """Return whether no string holds a lone surrogate, which no tokenizer takes."""
    try:
        "".join(_strings(value)).encode()
    except UnicodeEncodeError:
        return False
    return True
