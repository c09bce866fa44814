"""OpenAI's batches: a file of chat completions, answered within a day at half the price.

A job carries its name in the provider's metadata, so that one whose submission was cut off is found
again among the account's jobs.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, BinaryIO, Final

import orjson

from srft_prep.critic import Question
from srft_prep.critic.answers import Completion
from srft_prep.critic.api.connection import load_sdk
from srft_prep.critic.batch.provider import (
    QUICK_SECONDS,
    ItemResult,
    JobState,
    ProviderTrouble,
    RecentJob,
    item_failure,
    json_lines,
    troubles,
)
from srft_prep.errors import BackendError

ENDPOINT: Final = "/v1/chat/completions"
TAG: Final = "srft_prep"
"""The metadata's key for a job's name."""

_FULL: Final = ("token_limit_exceeded", "too_many_tasks", "rate_limit_exceeded")
"""Codes of jobs that failed for want of room in the account's queue."""
_FATAL: Final = ("billing_hard_limit_reached", "insufficient_quota", "exceeded_quota")
_ENDED: Final = {
    "completed": "the batch was completed without it",
    "expired": "the provider's time for the batch was over",
    "cancelled": "the batch was cancelled",
}


class OpenAIBatches:
    """A BatchProvider: OpenAI, or a server that speaks its batches."""

    name = "openai"
    max_requests = 50_000
    max_bytes = 200_000_000

    def __init__(
        self,
        *,
        body: Callable[[Question], Mapping[str, Any]],
        base_url: str | None = None,
        timeout_seconds: float = 600.0,
    ) -> None:
        """Take the function that makes a chat completion's body of a question.

        The key comes from the environment (OPENAI_API_KEY).

        Raises:
            ConfigError: the `openai` package is missing.
            BackendError: there is no key.
        """
        openai = load_sdk("openai")
        self._body = body
        self._quick = min(timeout_seconds, QUICK_SECONDS)
        self._troubles = partial(
            troubles, openai, openai.OpenAIError, where="OpenAI", key="OPENAI_API_KEY"
        )
        try:
            # No retries of its own: what may have been accepted must not be sent again unseen.
            self._client = openai.OpenAI(base_url=base_url, timeout=timeout_seconds, max_retries=0)
        except openai.OpenAIError as error:
            raise BackendError(f"OpenAI: expected a key in OPENAI_API_KEY: {error}") from None

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def line(self, custom_id: str, question: Question) -> bytes:
        """Return a request as one line of JSON."""
        body = self._body(question)
        entry = {"custom_id": custom_id, "method": "POST", "url": ENDPOINT, "body": body}
        return orjson.dumps(entry) + b"\n"

    def completion(self, response: dict[str, Any]) -> Completion:
        """Return what a chat completion says."""
        from srft_prep.critic.openai import completion_of

        return completion_of(response)

    def submit(self, lines: BinaryIO, *, name: str) -> str:
        """Upload a file of lines and make a job of it."""
        try:
            with self._troubles():
                file = self._client.files.create(
                    file=(f"{TAG}-{name}.jsonl", lines, "application/jsonl"), purpose="batch"
                )
        except ProviderTrouble as trouble:
            if trouble.kind == "unknown":  # A file alone is no job: it can be sent again.
                raise ProviderTrouble("again", str(trouble)) from None
            raise
        with self._troubles():
            job = self._client.batches.create(
                input_file_id=file.id,
                endpoint=ENDPOINT,
                completion_window="24h",
                metadata={TAG: name},
            )
        return str(job.id)

    def poll(self, job_id: str) -> JobState:
        """Return where a job stands."""
        with self._troubles():
            batch = self._client.batches.retrieve(job_id, timeout=self._quick)
        if batch.status in _ENDED:
            return JobState(phase="ended", reason=_ENDED[batch.status])
        if batch.status != "failed":
            return JobState(phase="running")
        errors = (batch.errors.data if batch.errors else None) or []
        reasons = [
            f"{error.code}: {error.message}" + (f" (line {error.line})" if error.line else "")
            for error in errors
        ]
        return JobState(
            phase="failed",
            reason="; ".join(reasons[:3]) or "no reason given",
            full=any(error.code in _FULL for error in errors),
            fatal=any(error.code in _FATAL for error in errors),
        )

    def results(self, job_id: str) -> Iterator[ItemResult]:
        """Yield the answers, then the errors."""
        with self._troubles():
            batch = self._client.batches.retrieve(job_id, timeout=self._quick)
        for file_id in (batch.output_file_id, batch.error_file_id):
            for entry in self._lines_of(file_id) if file_id else ():
                yield _item(entry)

    def recent(self, since: float) -> Iterator[RecentJob]:
        """Yield the account's jobs, the newest first."""
        with self._troubles():
            for batch in self._client.batches.list(limit=100, timeout=self._quick):
                if batch.created_at < since:
                    return
                yield RecentJob(
                    job_id=batch.id,
                    ended=batch.status in _ENDED or batch.status == "failed",
                    num_requests=batch.request_counts.total if batch.request_counts else None,
                    tag=(batch.metadata or {}).get(TAG, ""),
                )

    def cancel(self, job_id: str) -> None:
        """Ask for a job to end with what it has."""
        with self._troubles():
            self._client.batches.cancel(job_id, timeout=self._quick)

    def _lines_of(self, file_id: str) -> Iterator[Any]:
        with (
            self._troubles(),
            self._client.files.with_streaming_response.content(file_id) as response,
        ):
            yield from json_lines(response.iter_bytes())


def _item(entry: Mapping[str, Any]) -> ItemResult:
    custom_id = str(entry.get("custom_id"))
    response, error = entry.get("response") or {}, entry.get("error") or {}
    status, body = response.get("status_code"), response.get("body") or {}
    if status == 200 and not error:
        return ItemResult(custom_id=custom_id, response=body)
    failure = item_failure(status, error or body.get("error") or {"message": "no answer"})
    return ItemResult(custom_id=custom_id, failure=failure)
