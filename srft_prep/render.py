"""Messages -> chat text, with the place of every message known from the rendering itself.

The template is compiled once more with marks in its syntax tree (`marks`). A mark is a character
that occurs nowhere in the conversation, so that the marks can be taken out again and leave the
exact text that `apply_chat_template` gives. What lies between a message's mark and the next is
that message's rendering; no message text is ever searched for.

Control tokens inside a message (`<|im_end|>` in a file that the agent printed) are wrapped in two
further marks before rendering, so that they can be told from the template's own. They are encoded
as plain text, piece by piece, as transformers' `sanitize_control_tokens` does.

Templates are untrusted and run in transformers' own sandbox (`sandbox`).
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import jinja2

from srft_prep import marks
from srft_prep.errors import ConfigError, FormatError
from srft_prep.sandbox import fast_environment
from srft_prep.template_messages import strings_of

_PRIVATE_USE: Final = range(0xF0000, 0xFFFFE)
_SMALL_MARKS: Final = "".join(map(chr, range(1, 9)))
"""Control characters that no template strips; text with one of them stays one byte a character."""
_MAX_PREFIXES: Final = 8
"""Beyond that many beginnings of control tokens, one regular expression looks for all of them."""
_REFUSALS: Final = (
    *(jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError),
    RecursionError,  # arguments nested too deeply
)
"""What a template may raise on a conversation that it cannot render."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendering:
    """One conversation as chat text; all ranges are half-open, of characters."""

    text: str
    """The text, free of marks."""
    segments: dict[int, tuple[int, int]]
    """Message index -> the range of the message's rendering; absent where it wrote nothing."""
    forged: tuple[tuple[int, int], ...]
    """Ranges of control tokens that a message holds as text, in order."""
    calls: dict[int, int] = field(default_factory=dict)
    """Message index -> the character where its tool calls' rendering begins; absent if none."""
    generation: tuple[tuple[int, int], ...] = ()
    """Ranges of the template's `{% generation %}` blocks, in order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A conversation as a template is given it, see `ChatTemplate.prepare`."""

    messages: list[dict[str, Any]]
    """No object twice; with wrapped control tokens, if it holds some."""
    tools: list[dict[str, Any]] | None
    mark: str
    """A character that occurs nowhere in the conversation."""
    wrapping: tuple[str, str] | None
    """Two more, around each control token; None where there is none."""


class ChatTemplate:
    """A chat template, ready to render conversations with marks; not for use by two threads."""

    def __init__(
        self, source: str, *, variables: Mapping[str, Any], control_tokens: Sequence[str]
    ) -> None:
        """Compile a template.

        Args:
            source: the Jinja text.
            variables: what templates may use: the tokenizer's `special_tokens_map`, and more.
            control_tokens: the tokenizer's special tokens, as text.

        Raises:
            ConfigError: the text is no template, or has no loop that could be over messages.
        """
        from transformers.utils.chat_template_utils import _compile_jinja_template

        self._recorder = _Recorder()
        try:
            theirs = _compile_jinja_template(source).environment
            environment = fast_environment(theirs, filters=self._recorder.filters())
            tree = environment.parse(source)
            num_loops = marks.add_marks(tree)
            self._template = environment.from_string(tree)
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(
                f"the chat template is broken, line {error.lineno}: {error}"
            ) from None
        if not num_loops:
            raise ConfigError("the chat template has no loop over messages: nothing to train")
        self._variables = dict(variables)
        self.control_tokens = any_of(control_tokens)
        prefixes = {token[:2] for token in control_tokens if token}
        self._prefixes = sorted(prefixes) if len(prefixes) <= _MAX_PREFIXES else None

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
        prepared = self.prepare(messages, tools)
        return self.write(prepared, add_generation_prompt=add_generation_prompt)

    def prepare(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None
    ) -> Prepared:
        """Find out once what every rendering of a conversation's beginnings needs to know.

        Raises:
            FormatError: values are nested too deeply.
        """
        given = [_with_thinking(message) for message in messages]
        if len(set(map(id, given))) < len(given):
            given = [dict(message) for message in given]  # marks know a message by its identity
        texts = "\0".join(strings_of(given, tools))
        wrapping = None
        if self._may_hold_control_tokens(texts):
            wrapping = _unused_private(texts)
            with _refusals():
                given = _wrap(given, self.control_tokens, wrapping)
                tools = _wrap(tools, self.control_tokens, wrapping)
        return Prepared(messages=given, tools=tools, mark=_unused(texts), wrapping=wrapping)

    def write(
        self,
        prepared: Prepared,
        until: int | None = None,
        *,
        add_generation_prompt: bool = False,
    ) -> Rendering:
        """Return a conversation, or its messages before `until`, as `render` does.

        Raises:
            FormatError: the template refuses the conversation.
        """
        given = prepared.messages if until is None else prepared.messages[:until]
        with _refusals():
            self._recorder.start(given, prepared.mark)
            context = self._template.new_context(
                {
                    **self._variables,
                    "messages": given,
                    "tools": prepared.tools or None,
                    "documents": None,
                    "add_generation_prompt": add_generation_prompt,
                }
            )
            pieces = list(self._template.root_render_func(context))
        return self._recorder.rendering(pieces, prepared.wrapping)

    def _may_hold_control_tokens(self, texts: str) -> bool:
        if self._prefixes is not None and not any(each in texts for each in self._prefixes):
            return False
        return self.control_tokens.search(texts) is not None


@contextmanager
def _refusals() -> Iterator[None]:
    try:
        yield
    except _REFUSALS as error:
        raise FormatError(f"the chat template refuses the conversation: {error}") from None


def any_of(tokens: Sequence[str]) -> re.Pattern[str]:
    """Return a pattern that matches any of the tokens, the longest one that it can."""
    longest_first = sorted(filter(None, tokens), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


class _Recorder:
    """What the marks in a template call; it knows what the template is at."""

    def filters(self) -> dict[str, Callable[..., str]]:
        """Return what the marks call, by name."""
        return {
            marks.MESSAGE_FILTER: self.message,
            marks.END_FILTER: self.end,
            marks.CALLS_FILTER: self.calls,
            marks.OPEN_FILTER: self.open,
            marks.CLOSE_FILTER: self.close,
        }

    def start(self, messages: list[dict[str, Any]], mark: str) -> None:
        """Begin a rendering."""
        self._index_of = {id(message): index for index, message in enumerate(messages)}
        self._with_calls = {
            index for index, message in enumerate(messages) if message.get("tool_calls")
        }
        self._mark = mark
        self._current: int | None = None
        self._events: list[tuple[str, int | None]] = []

    def message(self, value: object) -> str:
        """Return the mark of a loop that is at a message."""
        index = self._index_of.get(id(value))
        if index is None:
            return ""
        self._current = index
        self._events.append(("message", index))
        return self._mark

    @jinja2.pass_context
    def end(self, _context: object, _value: object) -> str:
        """Return the mark behind a loop over messages."""
        if self._current is None:
            return ""
        self._current = None
        self._events.append(("message", None))
        return self._mark

    @jinja2.pass_context
    def calls(self, _context: object, _value: object) -> str:
        """Return the mark where the calls of the message begin."""
        if self._current not in self._with_calls:
            return ""
        self._with_calls.discard(self._current)
        self._events.append(("calls", self._current))
        return self._mark

    @jinja2.pass_context
    def open(self, _context: object, _value: object) -> str:
        """Return the mark at the head of a generation block."""
        self._events.append(("open", None))
        return self._mark

    @jinja2.pass_context
    def close(self, _context: object, _value: object) -> str:
        """Return the mark at the end of a generation block."""
        self._events.append(("close", None))
        return self._mark

    def rendering(self, pieces: list[str], wrapping: tuple[str, str] | None) -> Rendering:
        """Take the marks out of what a template wrote and note where they were."""
        marked = "".join(pieces)
        parts = marked.split(self._mark)
        assert len(parts) == len(self._events) + 1, "a template wrote a mark twice or not at all"
        forged: list[tuple[int, int]] = []
        position = 0
        if wrapping is not None:
            for i, part in enumerate(parts):
                parts[i], found = _unwrapped(part, wrapping)
                forged += ((start + position, end + position) for start, end in found)
                position += len(parts[i])
            position = 0
        segments: dict[int, tuple[int, int]] = {}
        calls: dict[int, int] = {}
        generation: list[tuple[int, int]] = []
        current, begun, opened = None, 0, 0
        for part, (kind, index) in zip(parts, self._events, strict=False):
            position += len(part)
            if kind == "message":
                if current is not None and position > begun:
                    segments[current] = (begun, position)
                current, begun = index, position
            elif kind == "calls":
                assert index is not None
                calls[index] = position
            elif kind == "open":
                opened = position
            else:
                generation.append((opened, position))
        position += len(parts[-1])
        if current is not None and position > begun:
            segments[current] = (begun, position)
        return Rendering(
            text="".join(parts),
            segments=segments,
            forged=tuple(forged),
            calls=calls,
            generation=tuple(generation),
        )


def _unused(texts: str) -> str:
    """Return a character that occurs in none of the texts, a small one if there is one."""
    small = (char for char in _SMALL_MARKS if char not in texts)
    return next(small, "") or _unused_private(texts, skip=2)[0]


def _unused_private(texts: str, *, skip: int = 0) -> tuple[str, str]:
    """Return two private-use characters that occur in none of the texts, `skip` left out."""
    unused = (char for char in map(chr, _PRIVATE_USE) if char not in texts)
    for _ in range(skip):
        next(unused)
    return next(unused), next(unused)


def _with_thinking(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message with its thoughts under the second name, too, as `apply_chat_template` does.

    Templates of gpt-oss and LFM2 read them as `thinking`.
    """
    if "reasoning_content" not in message:
        return message
    return {"thinking": message["reasoning_content"], **message}


def _wrap(value: Any, pattern: re.Pattern[str], wrapping: tuple[str, str]) -> Any:
    replacement = f"{wrapping[0]}\\g<0>{wrapping[1]}"

    def wrap(each: Any) -> Any:
        if isinstance(each, str):
            return pattern.sub(replacement, each)
        if isinstance(each, dict):
            return {pattern.sub(replacement, key): wrap(item) for key, item in each.items()}
        if isinstance(each, list):
            return [wrap(item) for item in each]
        return each

    return wrap(value)


def _unwrapped(part: str, wrapping: tuple[str, str]) -> tuple[str, list[tuple[int, int]]]:
    """Return a text without the marks of forged tokens, and where those tokens are.

    A template may cut a message within such a pair. What is left of it becomes an empty range: the
    text is encoded apart on either side, so that no control token arises where a template joins it.
    """
    opening, closing = wrapping
    pieces: list[str] = []
    forged: list[tuple[int, int]] = []
    position = 0
    opened: int | None = None
    for piece in re.split(f"([{opening}{closing}])", part):
        if piece == opening:
            if opened is not None:
                forged.append((opened, opened))
            opened = position
        elif piece == closing:
            forged.append((position if opened is None else opened, position))
            opened = None
        else:
            pieces.append(piece)
            position += len(piece)
    if opened is not None:
        forged.append((opened, opened))
    return "".join(pieces), forged
