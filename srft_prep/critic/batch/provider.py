"""What the batch driver asks of a provider, and how a provider's troubles and failures are told."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO, Final, Literal, Protocol

import orjson

from srft_prep.critic import Question, failure_of
from srft_prep.critic.answers import Completion
from srft_prep.critic.api.problems import problem_of
from srft_prep.errors import BackendError

TroubleKind = Literal["again", "unknown", "smaller", "refused", "missing"]
"""again: refused for now (too many requests). unknown: no answer, or a server's error: it may have
been done or not. smaller: too large. refused: invalid. missing: no such job or file."""

QUICK_SECONDS: Final = 60.0
"""The longest that a call may take which moves no requests and no results."""

_STATUSES: Final = {
    "invalid_request_error": 400,
    "authentication_error": 401,
    "billing_error": 402,
    "permission_error": 403,
    "not_found_error": 404,
    "request_too_large": 413,
    "rate_limit_error": 429,
    "rate_limit_exceeded": 429,
    "api_error": 500,
    "server_error": 500,
    "timeout_error": 504,
    "request_timeout": 504,
    "overloaded_error": 529,
}
"""Kinds of errors that come without an HTTP status -> the status that means the same."""


class ProviderTrouble(Exception):
    """A call to a provider that came to nothing, without the run being at its end."""

    def __init__(self, kind: TroubleKind, reason: str) -> None:
        super().__init__(reason)
        self.kind: TroubleKind = kind


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchSettings:
    """How large batches are, and how they are waited for."""

    max_requests: int = 10_000
    """Most requests of a batch; the provider's limit holds too."""
    max_bytes: int = 64 << 20
    """Most bytes of a batch with several requests; the provider's limit holds too."""
    max_jobs: int = 8
    """Most batches in flight at once."""
    poll_seconds: float = 30.0
    """Time between two looks at the batches in flight."""
    settle_seconds: float = 60.0
    """How long after a broken submission an accepted batch may take to show up in the list."""
    window_seconds: float = 26 * 3600.0
    """When a batch that does not end is given up; providers promise its end after 24 hours. It is
    cancelled a 26th of this before, so that what it has is not lost."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobState:
    """Where a job stands."""

    phase: Literal["running", "ended", "failed"]
    """ended: there are results, maybe not of all requests. failed: nothing of it was answered."""
    reason: str = ""
    """Why it failed, or why requests of an ended one may have no result."""
    full: bool = False
    """Failed for want of room in the account's queue: the same job may be taken later."""
    fatal: bool = False
    """Failed for a reason that no other job will escape."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ItemResult:
    """What came of one request of a job."""

    custom_id: str
    response: dict[str, Any] | None = None
    """The answer, in the provider's words; None where there is none."""
    failure: str = ""
    """Why there is none (`failure_of`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RecentJob:
    """A job as a provider lists it."""

    job_id: str
    ended: bool
    num_requests: int | None
    """None while the provider does not tell."""
    tag: str | None
    """The name that it was submitted with; None at a provider that keeps none."""


class BatchProvider(Protocol):
    """A provider of batches.

    All calls but `line` and `completion` may raise ProviderTrouble, or BackendError where the
    provider cannot be used at all.
    """

    name: str
    """In the journal; jobs are looked for at the provider of this name only."""
    max_requests: int
    """The most requests that a job may have."""
    max_bytes: int
    """The most bytes that a job may have."""

    def line(self, custom_id: str, question: Question) -> bytes:
        """Return a request as one line of JSON, with its newline."""
        ...

    def completion(self, response: dict[str, Any]) -> Completion:
        """Return what an answer says; ValueError where it is none."""
        ...

    def submit(self, lines: BinaryIO, *, name: str) -> str:
        """Submit a file of lines and return the job's id."""
        ...

    def poll(self, job_id: str) -> JobState:
        """Return where a job stands."""
        ...

    def results(self, job_id: str) -> Iterator[ItemResult]:
        """Yield what there is of an ended job, in any order."""
        ...

    def recent(self, since: float) -> Iterator[RecentJob]:
        """Yield the jobs made since a Unix time."""
        ...

    def cancel(self, job_id: str) -> None:
        """Ask for a job to end with what it has."""
        ...

    def close(self) -> None:
        """Free what the provider holds."""
        ...


def json_lines(chunks: Iterator[bytes]) -> Iterator[Any]:
    """Yield the values of JSON lines that come in pieces.

    Lines end at newlines and nothing else: an answer may hold U+2028, which text readers split at.

    Raises:
        ProviderTrouble: a line is no JSON; the rest of it did not come.
    """
    rest = b""
    try:
        for chunk in chunks:
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                if line.strip():
                    yield json.loads(line)
        if rest.strip():
            yield json.loads(rest)
    except ValueError as error:
        raise ProviderTrouble("unknown", f"the results are cut off or damaged: {error}") from None


@contextmanager
def troubles(sdk: Any, unanswered: type[Exception], *, where: str, key: str) -> Iterator[None]:
    """Raise what a call by an official client raises in the block as ProviderTrouble.

    Args:
        sdk: the client's package.
        unanswered: its base of all errors: those without an HTTP status are no answer.
        where: the provider, for errors.
        key: name of the environment variable that holds the API key.

    Raises:
        ProviderTrouble: the call came to nothing.
        BackendError: nothing can be done at all.
    """
    import httpx2

    try:
        yield
    except sdk.APIStatusError as error:
        raise _trouble_of(error.response, where=where, key=key) from None
    except (unanswered, httpx2.HTTPError) as error:
        raise ProviderTrouble("unknown", str(error) or type(error).__name__) from None


def _trouble_of(answer: Any, *, where: str, key: str) -> ProviderTrouble | BackendError:
    """Return the exception that an answer with an error status means for a call.

    BackendError where nothing can be done at all; where the key is not taken, without the
    provider's words, for they may quote it.
    """
    status = answer.status_code
    if status in (401, 403):
        return BackendError(
            f"{where}: expected an API key that may use batches, the provider refuses it "
            f"(HTTP {status}): set {key}"
        )
    problem = problem_of(status, answer.headers, answer.content, options={})
    if status in (404, 405):
        return ProviderTrouble("missing", problem.reason)
    if problem.action == "stop":
        return BackendError(f"{where}: {problem.reason}")
    if status == 413:
        return ProviderTrouble("smaller", problem.reason)
    if status >= 500:  # whatever it says of trying again, it may have been done
        return ProviderTrouble("unknown", problem.reason)
    kinds: dict[str, TroubleKind] = {"wait": "again", "retry": "unknown"}
    return ProviderTrouble(kinds.get(problem.action, "refused"), problem.reason)


def item_failure(status: int | None, error: Mapping[str, Any]) -> str:
    """Return the failure of one request of a job.

    Args:
        status: HTTP status of its answer; None where it has none.
        error: the provider's words: `code` or `type`, and `message`.
    """
    code = str(error.get("code") or error.get("type") or "")
    reason = ": ".join(filter(None, [code, str(error.get("message") or "")]))
    if "expired" in code or "cancel" in code:
        return failure_of("expired", reason)
    status = status or _STATUSES.get(code, 400)
    problem = problem_of(status, {}, orjson.dumps({"error": error}), options={})
    return failure_of(problem.kind, reason or problem.reason)
