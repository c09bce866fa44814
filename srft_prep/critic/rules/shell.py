"""Shell text -> simple commands: words, redirections and heredocs.

No shell grammar, but enough to tell `cat f` from `cat > f`. One pass of one pattern without
backtracking, so the work is linear in the text, and any text parses (an open quote runs to the
end). Command substitutions count as commands of their own.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

_TOKEN: Final = re.compile(
    r"""(?P<space>[ \t\r]+|\\\r?\n)
      | (?P<comment>\#[^\n]*)
      | (?P<heredoc><<-?[ \t]*(?P<mark>'[^'\n]*'|"[^"\n]*"|\\?[\w.-]+))
      | (?P<redirect>&>>?|\d*(?:>>|>\||>&|<&|<<<|<|>))
      | (?P<end>\n|;+|\|\||&&|\|&|\||&|\(|\))
      | (?P<word>(?:[^\s'"\\;|&<>()]++|'[^']*+'?|"(?:[^"\\]|\\.)*+"?|\\.|\\\Z)++)
      | (?P<other>.)""",
    re.VERBOSE | re.DOTALL,
)
_QUOTED: Final = re.compile(r"""'([^']*+)'?|"((?:[^"\\]|\\.)*+)"?|\\(.)|\\\Z""", re.DOTALL)
ASSIGNMENT: Final = re.compile(r"[A-Za-z_]\w*=")
"""The start of a word that assigns a variable."""


def word_set(text: str) -> frozenset[str]:
    """Return the words of a text as a set, for tables of names."""
    return frozenset(text.split())


_PREFIXES: Final = word_set(
    "if then else elif while until do ! time sudo env nohup command exec eval xargs { }"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """One simple command of a shell text."""

    words: tuple[str, ...]
    """The unquoted words: the program's name first; assignments and wrappers left out."""
    targets: tuple[str, ...] = ()
    """Files that its output is redirected into."""
    appends: tuple[str, ...] = ()
    """Those of `targets` that it adds to (`>>`)."""
    body: str = ""
    """The text of its heredoc."""

    @property
    def name(self) -> str:
        """The program's name without its folder; empty for a bare redirection."""
        return self.words[0].rpartition("/")[2] if self.words else ""

    @property
    def operands(self) -> tuple[str, ...]:
        """The words that are no options."""
        return tuple(word for word in self.words[1:] if not word.startswith("-"))


@dataclass(slots=True)
class _Draft:
    words: list[str] = field(default_factory=list)
    targets: list[str] = field(default_factory=list)
    appends: list[str] = field(default_factory=list)
    bodies: list[str] = field(default_factory=list)


def parse(text: str) -> tuple[Command, ...]:
    """Return the simple commands of a shell text, in order."""
    drafts = [_Draft()]
    heredocs: list[tuple[str, _Draft]] = []
    redirect = ""
    position = 0
    while position < len(text):
        match = _TOKEN.match(text, position)
        assert match is not None  # the last branch takes any character
        position = match.end()
        kind = match.lastgroup
        if kind == "heredoc":
            heredocs.append((match["mark"].strip("'\"\\"), drafts[-1]))
        elif kind == "redirect":
            redirect = match["redirect"]
        elif kind == "word":
            word = _unquote(match["word"])
            if not redirect:
                drafts[-1].words.append(word)
            elif ">" in redirect and _is_file(word, redirect):
                drafts[-1].targets.append(word)
                drafts[-1].appends += [word] if ">>" in redirect else []
            redirect = ""
        elif kind == "end":
            redirect = ""
            if "\n" in match["end"]:
                position = _take_heredocs(text, position, heredocs)
            drafts.append(_Draft())
    commands = (
        Command(
            words=_unwrapped(draft.words),
            targets=tuple(draft.targets),
            appends=tuple(draft.appends),
            body="\n".join(draft.bodies),
        )
        for draft in drafts
        if draft.words or draft.targets
    )
    return tuple(command for command in commands if command.words or command.targets)


def _unwrapped(words: Sequence[str]) -> tuple[str, ...]:
    rest = list(words)
    while rest and (rest[0] in _PREFIXES or ASSIGNMENT.match(rest[0])):
        wrapper = rest.pop(0)
        while wrapper in ("xargs", "sudo", "env") and rest and rest[0].startswith("-"):
            rest.pop(0)
    if rest and rest[0] == "timeout":
        rest.pop(0)
        while rest and rest[0].startswith("-"):
            rest.pop(0)
        rest = rest[1:]  # the duration
    return tuple(rest)


def _unquote(word: str) -> str:
    def inner(match: re.Match[str]) -> str:
        return match[1] or match[2] or match[3] or ""

    return _QUOTED.sub(inner, word)


def _is_file(word: str, redirect: str) -> bool:
    if word.startswith("/dev/") or (redirect.endswith("&") and (word.isdigit() or word == "-")):
        return False
    return bool(word)


def _take_heredocs(text: str, position: int, heredocs: list[tuple[str, "_Draft"]]) -> int:
    for mark, draft in heredocs:
        start = position
        while position < len(text):
            newline = text.find("\n", position)
            end = len(text) if newline < 0 else newline
            line, line_start, position = text[position:end].strip(), position, end + 1
            if line == mark:
                draft.bodies.append(text[start:line_start])
                break
        else:
            draft.bodies.append(text[start:])
    heredocs.clear()
    return position
