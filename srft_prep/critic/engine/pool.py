"""Worker processes that answer requests: started, fed, watched and replaced when they die.

A worker gets a greeting, says that it is ready and how much it takes at a time, and answers jobs in
any order. It is fed so that it never waits and never holds more than it said; jobs of one group
follow each other to one worker, for its prefix cache.

A worker that dies is started anew and its unanswered jobs are asked again. One of them may have
killed it, and blaming all would lose thousands of innocent ones, so they are asked in groups that
share the worker with nothing else: of a thousand first 32 at a time, then one by one. A job is
given up when it was in flight in three deaths and alone in the last one. Deaths without an answer
between them are no job's fault once there are too many: the backend is unusable.
"""

import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, Any, Final

from srft_prep.critic.engine.frames import Channel, frame_of
from srft_prep.errors import BackendError, ConfigError

DEATHS: Final = 3
"""Deaths that a job must have been in flight in to be given up."""
GROUPS: Final = 32
"""Into how many groups the suspects of a death are split, at most."""
DEATHS_IN_A_ROW: Final = 12
"""Deaths without an answer between them after which the backend is called unusable."""
STARTS: Final = 3
"""How often a worker that ran before is tried to be started."""
RESTART_SECONDS: Final = 3.0
"""Wait before each of those but the first: a GPU's memory is not free at once."""
CLOSE_SECONDS: Final = 10.0
UNSENT_BYTES: Final = 1 << 20
"""A worker that has not read this much is given no more."""
SHOWN_LINES: Final = 20


@dataclass(slots=True, kw_only=True)
class Job:
    """Something to ask a worker."""

    key: int
    """Comes back as `id` in the answer; unique within the pool's life."""
    message: Mapping[str, Any]
    num_tokens: int
    """Its share of what a worker takes at a time."""
    group: str
    """What it has a prefix in common with."""
    num_deaths: int = 0
    """Of workers that it was in flight in."""


@dataclass(slots=True, kw_only=True)
class _Worker:
    number: int
    environment: Mapping[str, str]
    process: subprocess.Popen[bytes]
    channel: Channel
    log: IO[bytes]
    """What it wrote to stdout and stderr."""
    window: int = 0
    """Jobs that it takes at a time; 0 until it is ready."""
    window_tokens: int = 0
    in_flight: dict[int, Job] = field(default_factory=dict)
    num_tokens: int = 0
    """Of the jobs in flight."""
    suspects: deque[list[Job]] = field(default_factory=deque)
    """Groups to be asked one after the other, with nothing else in flight."""
    is_trying: bool = False
    """Whether what is in flight is such a group."""
    last_words: str = ""
    """Why it ends, by its own account."""
    num_starts: int = 1
    """Since it was last ready."""
    was_ready: bool = False
    start_at: float | None = None
    """When to start it again (`time.monotonic`); None while it runs."""


class EnginePool:
    """Workers of one kind."""

    def __init__(
        self,
        command: Sequence[str],
        greeting: Mapping[str, Any],
        environments: Sequence[Mapping[str, str]],
        *,
        name: str,
        remedy: str,
    ) -> None:
        """Prepare the pool; nothing is started yet.

        Args:
            command: what to start; it gets the number of its socket and this process's id as
                arguments.
            greeting: the first message to every worker.
            environments: environment variables of each worker, beside this process's own.
            name: the backend's name, for messages.
            remedy: what to do where a worker cannot start, for messages.
        """
        self._command = tuple(command)
        self._greeting = frame_of(greeting)
        self._environments = tuple(environments)
        self._name = name
        self._remedy = remedy
        self._workers: list[_Worker] = []
        self._last: tuple[str, _Worker] | None = None
        """The group fed last, and to whom."""
        self._deaths_in_a_row = 0

    @property
    def size(self) -> int:
        """Number of workers, dead or alive."""
        return len(self._environments)

    @property
    def process_ids(self) -> tuple[int, ...]:
        """Process ids of the workers' guardians."""
        return tuple(worker.process.pid for worker in self._workers if worker.start_at is None)

    def ask(self, jobs: Iterable[Job]) -> Iterator[tuple[Job, Mapping[str, Any] | str]]:
        """Yield each job with its answer, in any order, or with the reason why there is none.

        Jobs are taken in the thread that iterates, one when a worker can use it.

        Raises:
            BackendError: no worker can start, or none stays alive.
            ConfigError: the worker refuses its greeting.
        """
        source = iter(jobs)
        more = True
        if not self._workers:
            self._workers = [self._spawn(i, env) for i, env in enumerate(self._environments)]
        try:
            while True:
                fed = False
                self._ask_suspects()
                if more and any(_has_room(worker) for worker in self._workers):
                    job = next(source, None)
                    more = fed = job is not None
                    if job is not None:
                        self._give(job)
                if not more and not self._unanswered():
                    return
                yield from self._turn(wait=not fed)
        finally:
            self._abandon()

    def close(self) -> None:
        """End all workers and wait until they are gone."""
        for worker in self._workers:
            worker.channel.close()
        until = time.monotonic() + CLOSE_SECONDS
        for worker in self._workers:
            self._end(worker, seconds=max(until - time.monotonic(), 0.1))
            worker.log.close()
        self._workers = []

    def _spawn(self, number: int, environment: Mapping[str, str]) -> _Worker:
        ours, theirs = socket.socketpair()
        log = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the worker
        with theirs:
            process = subprocess.Popen(
                [*self._command, str(theirs.fileno()), str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **environment},
                pass_fds=(theirs.fileno(),),
                process_group=0,  # Ctrl-C is for us: we end the workers
            )
        channel = Channel(ours)
        channel.send(self._greeting)
        return _Worker(
            number=number, environment=environment, process=process, channel=channel, log=log
        )

    def _give(self, job: Job) -> None:
        """Give a job to the worker that has its prefix, else to the one with the least to do."""
        group, worker = self._last or ("", None)
        if worker is None or group != job.group or not _has_room(worker):
            open_to = [worker for worker in self._workers if _has_room(worker)]
            worker = min(open_to, key=lambda worker: worker.num_tokens)
        self._last = (job.group, worker)
        _send(worker, job)

    def _ask_suspects(self) -> None:
        for worker in self._workers:
            if worker.in_flight or not worker.window:
                continue
            worker.is_trying = bool(worker.suspects)
            if worker.is_trying:
                for job in worker.suspects.popleft():
                    _send(worker, job)

    def _unanswered(self) -> bool:
        return any(worker.in_flight or worker.suspects for worker in self._workers)

    def _turn(self, *, wait: bool) -> Iterator[tuple[Job, Mapping[str, Any] | str]]:
        """Move what can be moved; yield what came of it."""
        alive = [worker for worker in self._workers if worker.start_at is None]
        poll = select.poll()
        for worker in alive:
            writing = select.POLLOUT if worker.channel.unsent_bytes else 0
            poll.register(worker.channel, select.POLLIN | writing)
        due = min((worker.start_at for worker in self._workers if worker.start_at), default=None)
        timeout = 0.0 if not wait else None
        if wait and due is not None:
            timeout = max(due - time.monotonic(), 0) * 1000
        ready = dict(poll.poll(timeout))
        for worker in alive:
            if worker.channel.fileno() in ready:
                yield from self._hear(worker)
        for worker in list(self._workers):
            if worker.start_at is not None and worker.start_at <= time.monotonic():
                self._restart(worker)

    def _hear(self, worker: _Worker) -> Iterator[tuple[Job, Mapping[str, Any] | str]]:
        worker.channel.flush()
        for message in worker.channel.receive():
            if "ready" in message:
                worker.window, worker.window_tokens = message["ready"]
                worker.num_starts, worker.was_ready = 0, True
            elif "ends" in message:
                worker.last_words = message["ends"]
                if message.get("config"):
                    self.close()
                    raise ConfigError(worker.last_words)
            elif (job := worker.in_flight.pop(message["id"], None)) is not None:
                worker.num_tokens -= job.num_tokens
                self._deaths_in_a_row = 0
                yield job, message
        if not worker.channel.is_open:
            yield from self._bury(worker)

    def _bury(self, worker: _Worker) -> Iterator[tuple[Job, str]]:
        """Decide what becomes of a dead worker and of the jobs that were in flight."""
        status = self._end(worker, seconds=CLOSE_SECONDS)
        story = worker.last_words or status
        lines = f"; its last lines:\n{tail}" if (tail := _tail(worker.log)) else ""
        worker.log.close()
        if not worker.was_ready:
            self.close()
            raise BackendError(
                f"{self._name}, worker {worker.number}: could not start: {story} "
                f"({self._remedy}){lines}"
            )
        jobs = list(worker.in_flight.values())
        worker.in_flight, worker.num_tokens, worker.window, worker.last_words = {}, 0, 0, ""
        if jobs:
            self._deaths_in_a_row += 1
        if self._deaths_in_a_row >= DEATHS_IN_A_ROW:
            self.close()
            raise BackendError(
                f"{self._name}, worker {worker.number}: died {DEATHS_IN_A_ROW} times without an "
                f"answer in between: {story}{lines}"
            )
        for job in jobs:
            job.num_deaths += 1
        if len(jobs) == 1 and jobs[0].num_deaths >= DEATHS:
            yield jobs[0], f"{jobs[0].num_deaths} deaths of its worker, the last: {story}"
        else:
            size = -(-len(jobs) // GROUPS)
            groups = [jobs[start : start + size] for start in range(0, len(jobs), size or 1)]
            worker.suspects.extendleft(reversed(groups))
        if worker.num_starts < STARTS:
            worker.start_at = time.monotonic() + (RESTART_SECONDS if worker.num_starts else 0)
            return
        self._workers.remove(worker)
        if not self._workers:
            raise BackendError(
                f"{self._name}, worker {worker.number}: died and could not be started again: "
                f"{story} ({self._remedy}){lines}"
            )
        self._workers[0].suspects.extend(worker.suspects)

    def _restart(self, worker: _Worker) -> None:
        fresh = self._spawn(worker.number, worker.environment)
        worker.process, worker.channel, worker.log = fresh.process, fresh.channel, fresh.log
        worker.num_starts += 1
        worker.start_at = None

    def _end(self, worker: _Worker, *, seconds: float) -> str:
        """Wait until a worker is gone, by force if need be; return how it ended."""
        worker.channel.close()
        try:
            code = worker.process.wait(seconds)
        except subprocess.TimeoutExpired:
            worker.process.terminate()
            try:
                code = worker.process.wait(CLOSE_SECONDS)
            except subprocess.TimeoutExpired:
                worker.process.kill()
                code = worker.process.wait()
        number = code - 128 if code > 128 else -code
        if number > 0:
            return f"killed by {signal.Signals(number).name}"
        return f"exit status {code}"

    def _abandon(self) -> None:
        """Forget all that is unanswered."""
        for worker in self._workers:
            if worker.in_flight and worker.start_at is None:
                worker.channel.send(frame_of({"abort": True}))
            worker.in_flight.clear()
            worker.suspects.clear()
            worker.num_tokens = 0


def _has_room(worker: _Worker) -> bool:
    return (
        not worker.suspects
        and len(worker.in_flight) < worker.window
        and worker.num_tokens < worker.window_tokens
        and worker.channel.unsent_bytes < UNSENT_BYTES
        and not worker.is_trying
    )


def _send(worker: _Worker, job: Job) -> None:
    worker.in_flight[job.key] = job
    worker.num_tokens += job.num_tokens
    worker.channel.send(frame_of({"id": job.key, **job.message}))


def _tail(log: IO[bytes]) -> str:
    end = log.seek(0, os.SEEK_END)
    log.seek(max(end - (1 << 14), 0))
    lines = log.read().decode(errors="replace").replace("\r", "\n").splitlines()
    return "\n".join([line for line in lines if line.strip()][-SHOWN_LINES:])


def worker_command(module: str) -> tuple[str, ...]:
    """Return the command that runs a worker's module with this Python."""
    return (sys.executable, "-m", module)
