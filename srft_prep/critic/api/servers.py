"""The servers of a run, and which of them takes the next request.

The next request goes where most is free. A server that cannot be connected to is set aside, while
another one lives, and probed until it is back. Everything here runs in one asyncio loop.
"""

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from srft_prep.critic.api.concurrency import AdaptiveLimit
from srft_prep.errors import BackendError


class Stopped(Exception):
    """The run is over: what waits need not wait any longer."""


@dataclass(kw_only=True)
class Server:
    """One base URL."""

    url: str
    """Without credentials, for people."""
    clients: list[Any]
    """The provider's official asynchronous client for each request that may still be sent; who
    sends one takes the last and puts it back."""
    limit: AdaptiveLimit
    hosted: bool
    """Whether it is the provider itself and not a server that speaks its format."""
    without: set[str] = field(default_factory=set)
    """What it refuses and requests therefore leave out."""
    num_answers: int = 0
    """How often it answered."""
    away: bool = False
    """Whether it is set aside."""


class Servers:
    """Hands servers to requests."""

    def __init__(
        self,
        servers: Sequence[Server],
        *,
        is_back: Callable[[Server], Awaitable[bool]],
        probe_seconds: float,
        longest_wait_seconds: float,
    ) -> None:
        """Take the servers.

        Args:
            servers: at least one.
            is_back: asks a server that was set aside whether it answers.
            probe_seconds: between two such questions at first; then twice as long, to a minute.
            longest_wait_seconds: a rate limit without a single success for longer ends the run.
        """
        self.servers = tuple(servers)
        self.error: BaseException | None = None
        """What ended the run."""
        self._is_back = is_back
        self._probe_seconds = probe_seconds
        self._longest_wait_seconds = longest_wait_seconds
        self._refused_since: float | None = None
        self._waiting: deque[asyncio.Future[tuple[Server, int]]] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self._probes: set[asyncio.Task[None]] = set()
        self._stopped = asyncio.Event()

    @property
    def size(self) -> int:
        """Requests that may be under way at all servers together."""
        return sum(int(server.limit.size) for server in self._live())

    async def take(self) -> tuple[Server, int]:
        """Return a server with one request more counted as under way, and the request's round.

        Raises:
            Stopped: the run is over.
        """
        if self.error:
            raise Stopped
        future: asyncio.Future[tuple[Server, int]] = asyncio.get_running_loop().create_future()
        self._waiting.append(future)
        self._dispatch()
        return await future

    def give_back(self, server: Server) -> None:
        """Count a request of a server as finished."""
        server.limit.end()
        self._dispatch()

    def succeeded(self, server: Server) -> None:
        """Take note of an answer."""
        server.limit.succeeded()
        server.num_answers += 1
        self._refused_since = None

    def refused(self, server: Server, sent_in: int, wait_seconds: float | None) -> None:
        """Take note that a server has too much to do; end the run where that lasts too long."""
        server.limit.refused(sent_in, wait_seconds)
        now = time.monotonic()
        if self._refused_since is None:
            self._refused_since = now
        until = min(each.limit.paused_until for each in self._live())
        if max(until, now) - self._refused_since > self._longest_wait_seconds:
            self.stop(
                BackendError(
                    f"{server.url}: expected an answer, got rate limits for "
                    f"{now - self._refused_since:.0f} s, and the next {max(until - now, 0):.0f} s "
                    "are to be waited (the account's limits may be used up; the same command "
                    "continues later)"
                )
            )

    def set_aside(self, server: Server) -> bool:
        """Send a server nothing more until it answers again; False where it is the last one."""
        if server.away:
            return True
        if len(self._live()) == 1:
            return False
        server.away = True
        probe = asyncio.get_running_loop().create_task(self._probe(server))
        self._probes.add(probe)
        probe.add_done_callback(self._probes.discard)
        return True

    def stop(self, error: BaseException) -> None:
        """End the run: everything that waits raises Stopped."""
        if self.error is None:
            self.error = error
        self._stopped.set()
        while self._waiting:
            future = self._waiting.popleft()
            if not future.done():
                future.set_exception(Stopped())

    async def sleep(self, seconds: float) -> None:
        """Wait.

        Raises:
            Stopped: the run is over.
        """
        try:
            await asyncio.wait_for(self._stopped.wait(), seconds)
        except TimeoutError:
            return
        raise Stopped

    async def close(self) -> None:
        """End the probes."""
        if self._timer:
            self._timer.cancel()
        probes = tuple(self._probes)
        for probe in probes:
            probe.cancel()
        await asyncio.gather(*probes, return_exceptions=True)

    def _live(self) -> list[Server]:
        return [server for server in self.servers if not server.away]

    def _dispatch(self) -> None:
        """Hand free servers to those who wait longest."""
        live = self._live()
        while self._waiting:
            if self._waiting[0].done():  # cancelled
                self._waiting.popleft()
                continue
            server = max(live, key=lambda each: each.limit.free())
            if server.limit.free() <= 0:
                self._wake_later(live)
                return
            self._waiting.popleft().set_result((server, server.limit.begin()))

    def _wake_later(self, live: Sequence[Server]) -> None:
        now = time.monotonic()
        pauses = [each.limit.paused_until - now for each in live if each.limit.paused_until > now]
        if pauses:
            if self._timer:
                self._timer.cancel()
            self._timer = asyncio.get_running_loop().call_later(min(pauses), self._dispatch)

    async def _probe(self, server: Server) -> None:
        seconds = self._probe_seconds
        while server.away:
            await asyncio.sleep(seconds)
            seconds = min(seconds * 2, 60.0)
            if await self._is_back(server):
                server.away = False
        self._dispatch()
