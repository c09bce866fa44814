"""One question to the servers, until it is answered or has failed.

What a server cannot take now (rate limits) waits without end, within the run's bound; what went
wrong is tried again a few times; what a server refuses to be told is left out from then on. No text
that comes from a server leaves this module with a key in it.
"""

import asyncio
import base64
import logging
import random
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Final, Protocol
from urllib.parse import unquote, urlsplit

import orjson

from srft_prep.critic import CriticRequest, FailureKind, Question
from srft_prep.critic.answers import Completion
from srft_prep.critic.api.concurrency import PAUSE_SECONDS
from srft_prep.critic.api.problems import Problem, problem_of
from srft_prep.critic.api.servers import Server, Servers, Stopped
from srft_prep.errors import BackendError

LOG: Final = logging.getLogger("srft_prep")
_LEAST_SECRET: Final = 8
"""Shorter keys are placeholders (`none`, `EMPTY`), which stand in many a text."""
_LONGEST_BACKOFF_SECONDS: Final = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long something is tried."""

    tries: int = 4
    """Of a request whose server fails or is out of reach."""
    unreadable_tries: int = 2
    """Of a request whose answers are none: each of them is billed."""
    backoff_seconds: float = 1.0
    """Before the second try; then twice as long each time."""
    pause_seconds: float = PAUSE_SECONDS
    """First pause after a rate limit that does not say how long to wait; it doubles, too."""
    limited_seconds: float = 1800.0
    """How long rate limits may last without a success, of the run and of one request."""
    lost_in_row: int = 20
    """Requests that fail one after another with no success between, until the run ends."""
    probe_seconds: float = 2.0
    """Before a server that was set aside is asked whether it is back."""
    drain_seconds: float = 30.0
    """How long answers under way are waited for where a run ends by an error."""


PATIENT: Final = Patience()
"""What a run on real servers needs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """What a server says of a model."""

    context_tokens: int | None = None
    """Longest prompt and answer together."""
    without: tuple[str, ...] = ()
    """Options that it does not take."""


class Wire(Protocol):
    """A provider's format: pure functions between what is asked and what stands on the wire."""

    provider: ClassVar[str]
    """Also the name of the official client's package."""
    client: ClassVar[str]
    """The asynchronous client's class in it."""
    path: ClassVar[str]
    """Where questions go, relative to the base URL."""
    options: ClassVar[Mapping[str, re.Pattern[str]]]
    """What a request can do without -> how a server that refuses it names it."""
    loses: ClassVar[Mapping[str, str]]
    """What labels lose without an option, where they lose something."""

    def body(
        self,
        request: CriticRequest,
        question: Question,
        *,
        hosted: bool,
        structured: bool,
        without: frozenset[str],
    ) -> dict[str, Any]:
        """Return the body that asks a question; its `messages` can be added to."""
        ...

    def options_in(self, body: Mapping[str, Any]) -> Sequence[str]:
        """Return the options that a body makes use of."""
        ...

    def completion_of(self, response: Any) -> Completion:
        """Return what a response says; ValueError where it is none."""
        ...

    def model_path(self, model: str) -> str:
        """Return where a server tells of a model."""
        ...

    def model_facts(self, response: Any, model: str) -> ModelFacts:
        """Return what it tells; ConfigError where it does not have the model."""
        ...

    def warmed_by(self, request: CriticRequest) -> tuple[Any, ...]:
        """Return what this request's prompt puts into the provider's cache for others, if any."""
        ...


class Failed(Exception):
    """A request got no answer."""

    def __init__(self, kind: FailureKind, reason: str) -> None:
        super().__init__(reason)
        self.kind, self.reason = kind, reason


class Secrets:
    """What must never be seen."""

    def __init__(self, key: str | None, urls: Iterable[str]) -> None:
        """Take a key, and URLs that may hold credentials."""
        found = {key or ""}
        for url in urls:
            parts = urlsplit(url)
            if parts.password:
                pair = f"{unquote(parts.username or '')}:{unquote(parts.password)}"
                found |= {parts.password, unquote(parts.password)}
                found.add(base64.b64encode(pair.encode()).decode())
        self._values = sorted((each for each in found if len(each) >= _LEAST_SECRET), key=len)[::-1]

    def scrub(self, text: str) -> str:
        """Return a text with `[key]` in the place of every secret."""
        for value in self._values:
            text = text.replace(value, "[key]")
        return text

    def scrub_completion(self, completion: Completion) -> Completion:
        """Return what a model wrote without secrets, and then without tokens, which hold them."""
        text = self.scrub(completion.text)
        refusal = self.scrub(completion.refusal) if completion.refusal else None
        if text == completion.text and refusal == completion.refusal:
            return completion
        return replace(completion, text=text, refusal=refusal, tokens=None)


class Exchange:
    """Asks questions through a provider's official client."""

    def __init__(
        self,
        wire: Wire,
        sdk: Any,
        *,
        servers: Servers,
        secrets: Secrets,
        timeout_seconds: float,
        patience: Patience,
    ) -> None:
        """Take the wire format, its client's package, and the servers to ask."""
        import httpx2

        self._wire, self._sdk, self._servers, self._secrets = wire, sdk, servers, secrets
        self._timeout_seconds, self._patience = timeout_seconds, patience
        self._response_type = httpx2.Response
        self._no_connection = (httpx2.ConnectError, httpx2.ConnectTimeout)
        self._lost_in_row = 0
        self._told: set[tuple[str, str, bool]] = set()

    async def ask(
        self,
        request: CriticRequest,
        question: Question,
        *,
        conversation: Sequence[Mapping[str, str]] = (),
        on_unreadable: Callable[[], None],
    ) -> Completion:
        """Return what a model answers.

        Args:
            request: what the question belongs to.
            question: what to ask.
            conversation: messages after the question.
            on_unreadable: called for each answer that is none, and was billed all the same.

        Raises:
            Failed: there is no answer.
            Stopped: the run is over.
        """
        tries, num_unreadable, structured = 0, 0, True
        limited_since: float | None = None
        while True:
            server, sent_in = await self._servers.take()
            body_without = partial(
                self._wire.body, request, question, hosted=server.hosted, structured=structured
            )
            without = frozenset(server.without)
            try:
                body = body_without(without=without)
                body["messages"].extend(conversation)
                outcome = await self._post(server, body)
                if isinstance(outcome, Completion):
                    self._servers.succeeded(server)
                    self._lost_in_row = 0
                    return self._secrets.scrub_completion(outcome)
                if outcome.busy:
                    self._servers.refused(server, sent_in, outcome.wait_seconds)
            finally:
                self._servers.give_back(server)
            problem = replace(outcome, reason=self._secrets.scrub(outcome.reason))
            reason = f"{server.url}: {problem.reason}"
            if problem.action == "stop" and problem.this_one:
                if server.num_answers:
                    self._lose(reason)
                    raise Failed(problem.kind, reason)
                tries += 1
                if tries < self._patience.tries:
                    await self._back_off(tries)  # Others may tell whether all are refused.
                    continue
            if problem.action == "stop":
                self._servers.stop(BackendError(f"{reason}; what is labelled is kept"))
                raise Stopped
            if problem.action == "fail":
                raise Failed(problem.kind, reason)
            if problem.action == "leave-out":
                option, more = problem.option or "", without | {problem.option or ""}
                if option in without or (
                    not problem.this_one
                    and option in self._wire.options_in(body_without(without=more))
                ):
                    raise Failed(problem.kind, f"{reason} (nothing more can be left out)")
                structured = self._leave_out(server, problem) and structured
            elif problem.action == "wait":
                limited_since = limited_since or time.monotonic()
                if time.monotonic() - limited_since > self._patience.limited_seconds:
                    raise Failed("unavailable", f"{reason} (for as long as it was asked)")
            elif not (problem.unreachable and self._servers.set_aside(server)):
                tries += 1
                num_unreadable += problem.unreadable
                if problem.unreadable:
                    on_unreadable()
                if (
                    tries >= self._patience.tries
                    or num_unreadable >= self._patience.unreadable_tries
                ):
                    self._lose(reason)
                    raise Failed(problem.kind, f"{reason} ({tries} tries)")
                await self._back_off(tries)

    async def _back_off(self, tries: int) -> None:
        """Wait before the next try; Stopped where the run ends meanwhile."""
        pause = self._patience.backoff_seconds * 2.0 ** (tries - 1)
        pause = min(pause, _LONGEST_BACKOFF_SECONDS) * random.uniform(0.5, 1.0)
        await self._servers.sleep(pause)

    async def _post(self, server: Server, body: Mapping[str, Any]) -> Completion | Problem:
        """Return the answer of one HTTP request, or why there is none."""
        try:
            content = orjson.dumps(body)
        except TypeError as error:
            return Problem(action="fail", kind="rejected", reason=f"the prompt is no text: {error}")
        # `post` with the response as its type: the client's own parsing into models takes longer
        # than everything else together (benchmarks/client_overhead.py).
        client = server.clients.pop()
        try:
            async with asyncio.timeout(self._timeout_seconds):
                response = await client.post(
                    self._wire.path, cast_to=self._response_type, content=content
                )
        except self._sdk.APIStatusError as error:
            response = error.response
            options = {name: self._wire.options[name] for name in self._wire.options_in(body)}
            return problem_of(
                response.status_code, response.headers, response.content, options=options
            )
        except (TimeoutError, self._sdk.APIConnectionError) as error:
            return self._lost_connection(error)
        finally:
            server.clients.append(client)
        try:
            return self._wire.completion_of(orjson.loads(response.content))
        except ValueError as error:
            reason = f"HTTP {response.status_code} with a body that is no answer: {error}"
            return Problem(action="retry", reason=reason[:300], unreadable=True)

    def _lost_connection(self, error: Exception) -> Problem:
        cause = error.__cause__ or error
        unreachable = isinstance(cause, self._no_connection)
        if isinstance(error, TimeoutError | self._sdk.APITimeoutError) and not unreachable:
            reason = f"no answer within {self._timeout_seconds:g} s"
            return Problem(action="retry", kind="timeout", reason=reason)
        name = "no connection" if unreachable else "the connection was lost"
        return Problem(
            action="retry",
            reason=f"{name}: {str(cause) or type(cause).__name__}",
            unreachable=unreachable,
        )

    def _leave_out(self, server: Server, problem: Problem) -> bool:
        """Note what a server refuses; return whether this request can still be held to a schema."""
        option = problem.option or ""
        this_one = problem.this_one and option in ("response_format", "output_config")
        if not this_one:
            server.without.add(option)
        self.tell(server, option, problem.reason, this_one=this_one)
        return not this_one

    def tell(self, server: Server, option: str, reason: str, *, this_one: bool = False) -> None:
        """Report, once a server, that something is left out."""
        if (server.url, option, this_one) in self._told:
            return
        self._told.add((server.url, option, this_one))
        span = "where it is refused" if this_one else "from now on"
        loses = self._wire.loses.get(option)
        LOG.warning(
            "%s: %s is left out %s%s: %s",
            server.url,
            option,
            span,
            f" ({loses})" if loses else "",
            reason,
        )

    def _lose(self, reason: str) -> None:
        self._lost_in_row += 1
        if self._lost_in_row >= self._patience.lost_in_row:
            self._servers.stop(
                BackendError(
                    f"{reason}; {self._lost_in_row} requests in a row got no answer, so the rest "
                    "were not sent (check the server; the same command continues)"
                )
            )
