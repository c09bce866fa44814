"""Text that others wrote, made harmless: what a terminal or a page is given, it shows.

A recorded run holds whatever programs printed: terminal codes, markup, characters that reverse the
direction of reading. All of them are shown as escapes, and none does anything.
"""

import html
import re
from contextlib import suppress
from typing import Any, Final

import orjson

_UNSEEN: Final = re.compile(r"[^ -~\t]+")
"""What may hold a character that does not print as itself."""


def printable(text: str) -> str:
    """Return text with control characters but tabs as escapes: it commands no terminal."""
    return "".join(_shown(char) for char in text)


def printable_lines(text: str) -> str:
    """Return text as `printable` does, but for its line ends, which stay."""
    return "\n".join(map(printable, text.split("\n")))


def written_out(value: Any) -> str:
    """Return a text as it is, and any other JSON value as JSON."""
    return value if isinstance(value, str) else orjson.dumps(value).decode()


def parsed_arguments(arguments: Any) -> Any:
    """Return the arguments of a tool call as the JSON value that they are.

    What a model wrote instead of JSON stays the text that it is, and so does what is nested so
    deeply that it can be read but not written out again.
    """
    if isinstance(arguments, str):
        with suppress(orjson.JSONDecodeError, orjson.JSONEncodeError):
            parsed = orjson.loads(arguments)
            orjson.dumps(parsed)
            return parsed
    return arguments


def escaped(text: str) -> str:
    r"""Return text as HTML that shows it, line by line, and runs and loads nothing.

    Characters of HTML become entities, so that it may stand in attributes in double quotes, too.
    What does not print as itself (control characters, marks of direction, spaces of other kinds,
    halves of surrogate pairs) becomes its Python escape, marked as one: the six characters
    `\u202e` in a text and the character U+202E differ on the page.
    """
    return _replaced(text, mark='<b class="escape">{}</b>')


def attribute(text: str) -> str:
    """Return text as the value of an HTML attribute in double quotes, in one line."""
    return _replaced(text.replace("\n", " "), mark="{}")


def _replaced(text: str, *, mark: str) -> str:
    def show(match: re.Match[str]) -> str:
        return "".join(
            char if char == "\n" or _is_plain(char) else mark.format(_shown(char))
            for char in match[0]
        )

    return _UNSEEN.sub(show, html.escape(text))


def _is_plain(char: str) -> bool:
    return char.isprintable() or char == "\t"


def _shown(char: str) -> str:
    return char if _is_plain(char) else char.encode("unicode_escape").decode()
