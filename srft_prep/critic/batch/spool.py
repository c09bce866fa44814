"""The requests of one batch until it is answered: their text on disk, the rest in memory."""

import time
from collections.abc import Collection
from dataclasses import dataclass, field
from tempfile import TemporaryFile
from typing import BinaryIO, Self

from srft_prep.critic import CriticRequest
from srft_prep.critic.batch.journal import JobEntry
from srft_prep.critic.batch.provider import JobState


@dataclass(slots=True)
class Spool:
    """Requests by custom id, and their lines in the same order in a file without a name."""

    requests: dict[str, CriticRequest] = field(default_factory=dict)
    """Those that wait for a result, without their text."""
    reserve_usd: dict[str, float] = field(default_factory=dict)
    """The most that each can cost."""
    num_bytes: int = 0
    refused_since: float | None = None
    """When the provider first had no room for it; monotonic seconds."""
    _file: BinaryIO | None = None

    def add(self, custom_id: str, request: CriticRequest, line: bytes, usd: float) -> None:
        """Add a request, without its text, its line, and the most that it can cost."""
        assert custom_id not in self.requests, f"{request.trajectory_id} was asked twice"
        if self._file is None:
            self._file = TemporaryFile()  # noqa: SIM115 - closed by `close`
        self._file.write(line)
        self.requests[custom_id] = request
        self.reserve_usd[custom_id] = usd
        self.num_bytes += len(line)

    def lines(self) -> BinaryIO:
        """Return the file, at its start."""
        assert self._file is not None, "a batch has a request"
        self._file.flush()
        self._file.seek(0)
        return self._file

    def halves(self) -> Collection[Self]:
        """Return two spools with half of the requests each; this one is closed."""
        halves = type(self)(), type(self)()
        lines = self.lines()
        for number, (custom_id, request) in enumerate(self.requests.items()):
            later = 2 * number >= len(self.requests)
            halves[later].add(custom_id, request, lines.readline(), self.reserve_usd[custom_id])
        for half in halves:
            half.refused_since = self.refused_since
        self.close()
        return halves

    def close(self) -> None:
        """Drop the text."""
        if self._file is not None:
            self._file.close()
            self._file = None


@dataclass(slots=True)
class Job:
    """A batch that was submitted, or may have been."""

    entry: JobEntry
    spool: Spool = field(default_factory=Spool)
    """The requests of this run that it is to answer."""
    ended: JobState | None = None
    given_up: bool = False
    """Whether there are no results to be had."""
    cancelled: bool = False
    """Whether the provider was asked to end it."""
    unknown_since: float = field(default_factory=time.monotonic)
    """Since when this run has not known whether it was accepted; monotonic seconds."""

    def is_ready(self, *, exhausted: bool) -> bool:
        """Whether results can be fetched: once, with all requests that wait for them known."""
        num_waiting = len(self.spool.requests)
        all_known = exhausted or num_waiting == len(self.entry.ids)
        return self.ended is not None and num_waiting > 0 and all_known
