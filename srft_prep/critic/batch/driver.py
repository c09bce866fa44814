"""Requests -> a provider's batches -> replies: half the price, and nothing asked twice.

Requests are spooled to a temporary file until a batch is full, then submitted, while those in
flight are polled. What is in flight stands in a journal, so that a killed run finds its jobs again
and waits for them. Invariant: a request that a job may still answer is in no other job. A reply
counts as taken when the next one is asked for: the caller has put it into the ledger by then. What
earlier runs have in flight counts against the budget (`Claims`).

Memory holds the requests in flight without their text, and one request; a batch's text is on disk.
"""

import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from srft_prep.critic import CriticReply, CriticRequest, FailureKind, failure_of
from srft_prep.critic.batch.claims import Claims
from srft_prep.critic.batch.journal import BatchJournal, custom_id_of
from srft_prep.critic.batch.provider import (
    BatchProvider,
    BatchSettings,
    ItemResult,
    JobState,
    ProviderTrouble,
)
from srft_prep.critic.batch.recovery import find_job
from srft_prep.critic.batch.replies import reply_of_result
from srft_prep.critic.batch.spool import Job, Spool
from srft_prep.critic.budget import Budget, most_usd
from srft_prep.critic.pricing import Price, Rates
from srft_prep.errors import BackendError

_KEPT_SECONDS: Final = 29 * 24 * 3600.0
"""How long providers keep results."""
_LONGEST_WAIT_SECONDS: Final = 900.0
_TELL_SECONDS: Final = 60.0


def label_in_batches(
    requests: Iterable[CriticRequest],
    *,
    provider: BatchProvider,
    journal: Path,
    critic_id: str,
    prompt_hash: str,
    price: Price | None = None,
    budget: Budget | None = None,
    settings: BatchSettings | None = None,
) -> Iterator[CriticReply]:
    """Yield a reply for each request, once the provider's batches have answered.

    Args:
        requests: each with its question, each key of the ledger once; pulled as batches fill.
        provider: where batches go.
        journal: file of the jobs in flight; the same file finds them again.
        critic_id: part of the requests' keys.
        prompt_hash: part of the requests' keys.
        price: of tokens; the provider's batch factor applies.
        budget: what the jobs of earlier runs are set aside from.
        settings: sizes and times, where not the usual ones.

    Raises:
        ConfigError: the journal cannot be used.
        BackendError: the provider cannot be used: no valid key, out of reach for longer than jobs
            live, or it does not know a job of the journal.
    """
    with closing(
        BatchJournal.open(
            journal, provider=provider.name, critic_id=critic_id, prompt_hash=prompt_hash
        )
    ) as opened:
        driver = _Driver(
            requests=iter(requests),
            provider=provider,
            journal=opened,
            price=price,
            settings=settings or BatchSettings(),
            claims=Claims(budget),
        )
        with closing(driver):
            yield from driver.replies()


@dataclass(slots=True, kw_only=True)
class _Driver:
    requests: Iterator[CriticRequest]
    provider: BatchProvider
    journal: BatchJournal
    price: Price | None
    settings: BatchSettings
    claims: Claims

    jobs: list[Job] = field(default_factory=list)
    spool: Spool = field(default_factory=Spool)
    """Fills."""
    waiting: deque[Spool] = field(default_factory=deque)
    """Full, not submitted yet."""
    replies_without_result: deque[CriticReply] = field(default_factory=deque)
    exhausted: bool = False
    next_poll: float = 0.0
    next_submission: float = 0.0
    num_refusals: int = 0
    """Times in a row that the provider had no room for a batch."""
    num_troubles: int = 0
    """Polls in a row with an error."""
    troubled_since: float | None = None
    max_bytes: int = 0
    """Of a batch; less once the provider has called one too large."""
    last_told: float = field(default_factory=time.monotonic)
    num_pulled: int = 0
    num_done: int = 0

    def replies(self) -> Iterator[CriticReply]:
        self.max_bytes = min(self.settings.max_bytes, self.provider.max_bytes)
        for entry in self.journal.jobs.values():
            job = Job(entry)
            self.jobs.append(job)
            self.claims.add(job)
        while True:
            if time.monotonic() >= self.next_poll:
                self._poll()
            ready = [job for job in self.jobs if job.is_ready(exhausted=self.exhausted)]
            if ready:
                yield from self._finish(ready[0])
            elif self.replies_without_result:
                self.num_done += 1
                yield self.replies_without_result.popleft()
            elif (
                not self.exhausted
                and self._num_running() + len(self.waiting) < self.settings.max_jobs
            ):
                self._pull()
            elif self.exhausted and not self.waiting and not self._num_running():
                return
            else:
                time.sleep(max(0.0, self.next_poll - time.monotonic()))

    def close(self) -> None:
        self.claims.close()
        for spool in (self.spool, *self.waiting, *(job.spool for job in self.jobs)):
            spool.close()

    def _num_running(self) -> int:
        return sum(job.ended is None and bool(job.spool.requests) for job in self.jobs)

    def _pull(self) -> None:
        """Take one more request: to the job that holds it, or into the next batch."""
        request = next(self.requests, None)
        if request is None:
            self.exhausted = True
            self._seal()
            return
        assert request.question is not None, "a model's request has a question"
        self.num_pulled += 1
        custom_id = custom_id_of(
            request, critic_id=self.journal.critic_id, prompt_hash=self.journal.prompt_hash
        )
        line = self.provider.line(custom_id, request.question)
        usd = most_usd(request.question, Rates(price=self.price, batch=True))
        if holder := self.claims.pop(custom_id):
            kept = line if holder.ended is None else b""
            holder.spool.add(custom_id, request.light(), kept, usd)
        elif len(line) > self.provider.max_bytes:
            reason = f"{len(line):,} bytes, a batch may have {self.provider.max_bytes:,}"
            self._fail(request.light(), "over-long", reason)
        else:
            if self.spool.num_bytes + len(line) > self.max_bytes:
                self._seal()
            self.spool.add(custom_id, request.light(), line, usd)
            most = min(self.settings.max_requests, self.provider.max_requests)
            if len(self.spool.requests) >= most:
                self._seal()

    def _seal(self) -> None:
        if self.spool.requests:
            self.waiting.append(self.spool)
            self.spool = Spool()
        self._submit()

    def _submit(self) -> None:
        """Submit the full batches that there is room for."""
        while (
            self.waiting
            and self._num_running() < self.settings.max_jobs
            and time.monotonic() >= self.next_submission
        ):
            spool = self.waiting.popleft()
            job = Job(self.journal.intend(spool.reserve_usd), spool)
            self.jobs.append(job)
            try:
                job_id = self.provider.submit(spool.lines(), name=job.entry.name)
            except BackendError:
                self.journal.dropped(job.entry, "the provider cannot be used")
                raise
            except ProviderTrouble as trouble:
                job.unknown_since = time.monotonic()
                if trouble.kind == "missing":
                    self.journal.dropped(job.entry, str(trouble))
                    raise BackendError(
                        f"{self.provider.name}: expected a server with batches, got {trouble}; "
                        "leave --batch out"
                    ) from None
                if trouble.kind != "unknown":
                    self._drop(job, str(trouble))
                    self._refuse(spool, trouble)
            else:
                self.journal.submitted(job.entry, job_id)
                if self.num_refusals:  # one at a time, until one has gone through
                    self._delay_submissions()

    def _refuse(self, spool: Spool, trouble: ProviderTrouble, *, halve: bool = False) -> None:
        """Put a batch that was not accepted back, or its requests among the failures."""
        num_waiting = len(spool.requests)
        if trouble.kind == "smaller" and num_waiting == 1:
            self._fail_all(spool, "over-long", str(trouble))
        elif trouble.kind == "smaller":
            self.max_bytes = max(spool.num_bytes // 2, 1)
            self.waiting.extendleft(reversed([*spool.halves()]))
        elif trouble.kind != "again":
            self._fail_all(spool, "rejected", str(trouble))
        else:
            now = time.monotonic()
            if not self.num_refusals:
                _tell(f"{self.provider.name} takes no batch now, trying again: {trouble}")
            self.num_refusals += 1
            self._delay_submissions()
            spool.refused_since = spool.refused_since or now
            if now - spool.refused_since > self.settings.window_seconds:
                self._fail_all(spool, "unavailable", str(trouble))
            elif halve and num_waiting > 1:
                self.waiting.extendleft(reversed([*spool.halves()]))
            else:
                self.waiting.appendleft(spool)

    def _delay_submissions(self) -> None:
        """Let some time pass before the next try, the longer the more have failed."""
        wait = self.settings.poll_seconds * 2.0 ** min(self.num_refusals - 1, 20)
        self.next_submission = time.monotonic() + min(wait, _LONGEST_WAIT_SECONDS)

    def _fail_all(self, spool: Spool, kind: FailureKind, reason: str) -> None:
        for request in spool.requests.values():
            self._fail(request, kind, reason)
        spool.close()

    def _fail(self, request: CriticRequest, kind: FailureKind, reason: str) -> None:
        reply = CriticReply(request=request, failure=failure_of(kind, reason))
        self.replies_without_result.append(reply)

    def _poll(self) -> None:
        """Look at every job in flight, then submit what there is room for."""
        troubled = []
        for job in list(self.jobs):
            if job.ended is None and (job.spool.requests or not self.exhausted):
                try:
                    self._look(job)
                except ProviderTrouble as trouble:
                    troubled.append((job, trouble))
        for job, reason in troubled:
            if job.spool.requests:  # else nobody has asked for it yet
                self._endure(reason, job)
        if troubled:
            self.num_troubles += 1
        else:
            self.num_troubles, self.troubled_since = 0, None
        self._submit()
        self._tell_progress()
        self.next_poll = time.monotonic() + self._pause()

    def _pause(self) -> float:
        wait = self.settings.poll_seconds * 2.0 ** min(self.num_troubles, 20)
        return min(wait, max(_LONGEST_WAIT_SECONDS, self.settings.poll_seconds))

    def _endure(self, trouble: ProviderTrouble, job: Job) -> None:
        """Bear an error of a poll or a download, as long as a job may live and an hour more."""
        now = time.monotonic()
        age = job.entry.age_seconds
        if trouble.kind not in ("missing", "refused"):
            self.troubled_since = self.troubled_since or now
            seconds = now - self.troubled_since
            if age > self.settings.window_seconds and seconds > self.settings.window_seconds / 26:
                raise BackendError(
                    f"{self.provider.name}: no sound answer for {seconds:.0f} s ({trouble}); its "
                    f"batches are in {self.journal.path}: run the same command again when it works"
                )
        elif age < _KEPT_SECONDS:
            raise BackendError(
                f"{self.journal.path}: {self.provider.name} does not know the batch "
                f"{job.entry.job_id or job.entry.name} that it is to answer ({trouble}): expected "
                "the server and the account that it was submitted to; if it was deleted there, "
                f'append the line {{"event":"dropped","name":"{job.entry.name}"}} to ask again'
            )
        else:
            job.ended, job.given_up = JobState(phase="ended", reason=str(trouble)), True

    def _look(self, job: Job) -> None:
        window = self.settings.window_seconds
        if job.entry.job_id is None and not self._is_resolved(job):
            return
        assert job.entry.job_id is not None
        state = self.provider.poll(job.entry.job_id)
        age = job.entry.age_seconds
        if state.phase == "ended":
            job.ended = state
            self.num_refusals, self.next_submission = 0, 0.0
        elif state.phase == "failed":
            self._drop(job, state.reason)
            if state.fatal:
                job.spool.close()
                raise BackendError(f"{self.provider.name}: a batch has failed: {state.reason}")
            if job.spool.requests:
                trouble = ProviderTrouble("again" if state.full else "refused", state.reason)
                self._refuse(job.spool, trouble, halve=not self._num_running())
        elif age > window:
            reason = f"no end after {age / 3600:.1f} hours"
            job.ended, job.given_up = JobState(phase="ended", reason=reason), True
        elif age > window * 25 / 26 and not job.cancelled:
            job.cancelled = True
            with suppress(ProviderTrouble):
                self.provider.cancel(job.entry.job_id)

    def _is_resolved(self, job: Job) -> bool:
        """Look for a job whose submission was cut off; one never accepted is submitted again."""
        found = find_job(job.entry, self.provider, known=self.journal.known_job_ids)
        age = job.entry.age_seconds
        if found == "may be running" and age < self.settings.window_seconds:
            return False
        if found in (None, "may be running"):
            if time.monotonic() > job.unknown_since + self.settings.settle_seconds:
                self._drop(job, "never accepted")
                if job.spool.requests:
                    self.waiting.appendleft(job.spool)
            return False
        self.journal.submitted(job.entry, found)
        return True

    def _drop(self, job: Job, reason: str) -> None:
        """Forget a job that answers nothing; requests of it still to come are then sent anew."""
        self.journal.dropped(job.entry, reason)
        self.jobs.remove(job)
        for custom_id in job.entry.ids:
            self.claims.pop(custom_id)

    def _finish(self, job: Job) -> Iterator[CriticReply]:
        """Yield a reply for each request that waits for an ended job."""
        waiting = job.spool.requests
        assert job.ended is not None
        job.spool.close()
        seconds = job.entry.age_seconds
        for result in self._results(job):
            if request := waiting.pop(result.custom_id, None):
                yield self._reply(request, result, seconds)
                self.journal.taken(job.entry, [result.custom_id])
        failure = failure_of("expired", job.ended.reason)
        for custom_id in list(waiting):
            result = ItemResult(custom_id=custom_id, failure=failure)
            yield self._reply(waiting.pop(custom_id), result, seconds)
            self.journal.taken(job.entry, [custom_id])
        self.jobs.remove(job)

    def _results(self, job: Job) -> Iterator[ItemResult]:
        while not job.given_up:
            assert job.entry.job_id is not None
            try:
                yield from self.provider.results(job.entry.job_id)
            except ProviderTrouble as trouble:
                self._endure(trouble, job)
                self.num_troubles += 1
                time.sleep(self._pause())
            else:
                self.num_troubles, self.troubled_since = 0, None
                return

    def _reply(self, request: CriticRequest, result: ItemResult, seconds: float) -> CriticReply:
        self.num_done += 1
        return reply_of_result(
            request, result, provider=self.provider, price=self.price, seconds=seconds
        )

    def _tell_progress(self) -> None:
        now = time.monotonic()
        if now - self.last_told >= _TELL_SECONDS:
            self.last_told = now
            _tell(
                f"{self._num_running()} batches in flight at {self.provider.name}, "
                f"{self.num_done}/{self.num_pulled} requests answered"
            )


def _tell(words: str) -> None:
    sys.stderr.write(f"batches: {words}\n")
    sys.stderr.flush()
