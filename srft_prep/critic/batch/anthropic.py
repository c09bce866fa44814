"""Anthropic's message batches: answered within a day at half the price.

A job carries no name of ours, so one whose submission was cut off is found again by the custom ids
in its results.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, BinaryIO

import orjson

from srft_prep.critic import Question, failure_of
from srft_prep.critic.answers import Completion
from srft_prep.critic.api.connection import load_sdk
from srft_prep.critic.batch.provider import (
    QUICK_SECONDS,
    ItemResult,
    JobState,
    RecentJob,
    item_failure,
    json_lines,
    troubles,
)
from srft_prep.errors import BackendError

_PATH = "/v1/messages/batches"
_HEAD, _TAIL = b'{"requests":[', b"]}"


class AnthropicBatches:
    """A BatchProvider: Anthropic."""

    name = "anthropic"
    max_requests = 100_000
    max_bytes = 256_000_000

    def __init__(
        self,
        *,
        body: Callable[[Question], Mapping[str, Any]],
        base_url: str | None = None,
        timeout_seconds: float = 600.0,
    ) -> None:
        """Take the function that makes a message's body of a question.

        The key comes from the environment (ANTHROPIC_API_KEY).

        Raises:
            ConfigError: the `anthropic` package is missing.
            BackendError: there is no key.
        """
        anthropic = load_sdk("anthropic")
        self._body = body
        self._quick = min(timeout_seconds, QUICK_SECONDS)
        self._troubles = partial(
            troubles,
            anthropic,
            anthropic.AnthropicError,
            where="Anthropic",
            key="ANTHROPIC_API_KEY",
        )
        # No retries of its own: what may have been accepted must not be sent again unseen.
        self._client = anthropic.Anthropic(
            base_url=base_url, timeout=timeout_seconds, max_retries=0
        )
        if not (self._client.api_key or self._client.auth_token or self._client.credentials):
            raise BackendError("Anthropic: expected a key in ANTHROPIC_API_KEY, which is not set")

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def line(self, custom_id: str, question: Question) -> bytes:
        """Return a request as one line of JSON."""
        return orjson.dumps({"custom_id": custom_id, "params": self._body(question)}) + b"\n"

    def completion(self, response: dict[str, Any]) -> Completion:
        """Return what a message says."""
        from srft_prep.critic.anthropic import completion_of

        return completion_of(response)

    def submit(self, lines: BinaryIO, *, name: str) -> str:
        """Send the lines as one request; the body is read from the file as it goes out."""
        from anthropic.types.messages import MessageBatch

        del name  # The provider keeps no words of ours.
        num_lines, num_bytes = 0, 0
        for line in lines:
            num_lines, num_bytes = num_lines + 1, num_bytes + len(line)
        lines.seek(0)
        # Newlines give way to the commas between the requests: all but the last.
        length = len(_HEAD) + num_bytes - 1 + len(_TAIL)
        headers = {"Content-Type": "application/json", "Content-Length": str(length)}
        with self._troubles():
            job = self._client.post(
                _PATH,
                content=_array(lines, num_lines),
                options={"headers": headers},
                cast_to=MessageBatch,
            )
        return str(job.id)

    def poll(self, job_id: str) -> JobState:
        """Return where a job stands."""
        with self._troubles():
            batch = self._client.messages.batches.retrieve(job_id, timeout=self._quick)
        if batch.processing_status != "ended":
            return JobState(phase="running")
        return JobState(phase="ended", reason="the batch ended without it")

    def results(self, job_id: str) -> Iterator[ItemResult]:
        """Yield what came of the requests."""
        with self._troubles():
            batches = self._client.messages.batches.with_streaming_response
            with batches.results(job_id) as response:
                for entry in json_lines(response.iter_bytes()):
                    yield _item(entry)

    def recent(self, since: float) -> Iterator[RecentJob]:
        """Yield the workspace's jobs, the newest first."""
        with self._troubles():
            for batch in self._client.messages.batches.list(limit=100, timeout=self._quick):
                if batch.created_at.timestamp() < since:
                    return
                counts = batch.request_counts
                yield RecentJob(
                    job_id=batch.id,
                    ended=batch.processing_status == "ended",
                    num_requests=counts.processing
                    + counts.succeeded
                    + counts.errored
                    + counts.canceled
                    + counts.expired,
                    tag=None,
                )

    def cancel(self, job_id: str) -> None:
        """Ask for a job to end with what it has."""
        with self._troubles():
            self._client.messages.batches.cancel(job_id, timeout=self._quick)


def _array(lines: BinaryIO, num_lines: int) -> Iterator[bytes]:
    yield _HEAD
    for number, line in enumerate(lines, start=1):
        yield line[:-1] + (b"," if number < num_lines else b"")
    yield _TAIL


def _item(entry: Mapping[str, Any]) -> ItemResult:
    custom_id, result = str(entry.get("custom_id")), entry.get("result") or {}
    kind = result.get("type")
    if kind == "succeeded":
        return ItemResult(custom_id=custom_id, response=result.get("message") or {})
    if kind == "errored":
        # The error's envelope, and in it the error.
        envelope = result.get("error") or {}
        failure = item_failure(None, envelope.get("error") or envelope)
        return ItemResult(custom_id=custom_id, failure=failure)
    if kind in ("expired", "canceled"):
        reason = "the provider's time for the batch was over"
        if kind == "canceled":
            reason = "the batch was cancelled"
        return ItemResult(custom_id=custom_id, failure=failure_of("expired", reason))
    failure = failure_of("rejected", f"expected a result of a known type, got {kind!r}")
    return ItemResult(custom_id=custom_id, failure=failure)
