"""What a server's error means, and so what is to be done about it: a pure function.

Providers tell kinds of errors apart by status, and within the status 400 by words only.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from srft_prep.critic import FailureKind
from srft_prep.critic.api.concurrency import wait_seconds_of
from srft_prep.errors import in_one_line

Action = Literal["wait", "retry", "leave-out", "fail", "stop"]

SHOWN_CHARACTERS: Final = 300
"""Of a server's words in a message."""

_OVERLONG: Final = re.compile(
    r"context.{0,20}(?:length|window|size|limit)|maximum context|max_model_len|too many tokens"
    r"|prompt is too long|input is too long|request too large|longer than the (?:model|maximum)"
    r"|exceeds? the (?:model|maximum|max).{0,40}token",
    re.IGNORECASE,
)
_UNPAID: Final = re.compile(
    r"insufficient_quota|exceeded your current quota|credit balance|billing", re.IGNORECASE
)
_DECLINED: Final = re.compile(r"content_filter|content_policy|content management", re.IGNORECASE)
_THIS_ONE: Final = re.compile(
    r"too (?:many|complex|large|long|deep)|exceed|more than|limit|at most", re.IGNORECASE
)

_VALUED: Final = frozenset({"max_tokens", "max_completion_tokens"})
"""Options that a server names for their value, too: only its words say that it does not know
them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Why a request brought no answer, and what to do."""

    action: Action
    """wait: the server is busy, ask again without end. retry: ask again a few times. leave-out: ask
    again without `option`. fail: this request has failed. stop: so would every other."""
    reason: str
    """In one line, for people."""
    kind: FailureKind = "unavailable"
    """The failure that it is where nothing more is tried."""
    busy: bool = False
    """Whether fewer requests at a time would help."""
    wait_seconds: float | None = None
    """What the server asks to wait."""
    option: str | None = None
    """What the server refuses."""
    this_one: bool = False
    """Whether it concerns this request only; for `stop` it may, and does if others succeed."""
    unreachable: bool = False
    """Whether no connection came about."""
    unreadable: bool = False
    """Whether it is an answer, and was billed, that nobody can read."""


def problem_of(
    status: int,
    headers: Mapping[str, str],
    content: bytes,
    *,
    options: Mapping[str, re.Pattern[str]],
) -> Problem:
    """Return what a response with an error status means.

    Args:
        status: of the response.
        headers: of the response, with lower-case names.
        content: its body.
        options: what the request could do without -> how a server that refuses it names it, in the
            order of trying.
    """
    code, named, message = _words_of(content)
    reason = f"HTTP {status}: {message}" if message else f"HTTP {status}"
    words = f"{code} {message}"
    wait = wait_seconds_of(headers)
    if status in (401, 403):
        return Problem(
            action="stop",
            kind="refused",
            reason=f"{reason} (check the key and what it may use)",
            this_one=status == 403,
        )
    if status == 402 or (status in (400, 429) and _UNPAID.search(words)):
        return Problem(action="stop", reason=f"{reason} (the account has no money left)")
    if status in (404, 405):
        return Problem(
            action="stop",
            kind="rejected",
            reason=f"{reason} (check --base-url and --model)",
            this_one=status == 404,
        )
    if status == 413 or (status in (400, 422, 429) and _OVERLONG.search(words)):
        return Problem(action="fail", kind="over-long", reason=reason)
    if status in (429, 529) or (status == 503 and wait is not None):
        return Problem(action="wait", reason=reason, busy=True, wait_seconds=wait)
    if status in (408, 504):
        return Problem(action="retry", kind="timeout", reason=reason)
    if status == 409 or status >= 500:
        return Problem(action="retry", reason=reason, busy=status == 503)
    if status in (400, 422):
        if _DECLINED.search(words):
            return Problem(action="fail", kind="refused", reason=reason)
        for option, pattern in options.items():
            is_valued = option in _VALUED
            told = f"{named} {message}" if is_valued else message
            if (named == option and not is_valued) or pattern.search(told):
                this_one = _THIS_ONE.search(message) is not None
                return Problem(
                    action="leave-out",
                    kind="rejected",
                    reason=reason,
                    option=option,
                    this_one=this_one,
                )
    return Problem(action="fail", kind="rejected", reason=reason)


def _words_of(content: bytes) -> tuple[str, str, str]:
    """Return the code, the parameter and the message of an error in any of the usual shapes."""
    try:
        value: Any = json.loads(content)
    except ValueError:
        return "", "", _line(content.decode("utf-8", "replace"))
    error = value.get("error", value) if isinstance(value, dict) else value
    if not isinstance(error, dict):
        return "", "", _line(str(error))
    message = error.get("message") or error.get("detail") or json.dumps(error)
    codes = " ".join(str(error.get(name) or "") for name in ("type", "code"))
    return codes, str(error.get("param") or ""), _line(str(message))


def _line(text: str) -> str:
    text = in_one_line(text)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]} …"
