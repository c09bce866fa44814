"""How many requests one server takes at a time, found out by asking.

The limit doubles each round trip until the first refusal; from then on it grows by a fixed step a
round trip and is halved by a refusal. All refusals of one round trip count as one: requests that
were sent before the limit was last halved say nothing about the new one. A server that says how
long to wait is left alone for that long; one that does not, for a time that doubles.
"""

import math
import random
import re
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Final

START: Final = 64
"""Requests at a time before anything is known."""
PAUSE_SECONDS: Final = 0.5
_GROWTH_ROUND_TRIPS: Final = 32
"""Round trips that it takes to grow from nothing to the highest limit."""
_LONGEST_PAUSE_SECONDS: Final = 60.0
_SECONDS: Final = re.compile(r"\d+(?:\.\d+)?")


class AdaptiveLimit:
    """The number of requests that may be under way at one server."""

    def __init__(
        self,
        highest: int,
        *,
        start: int = START,
        pause_seconds: float = PAUSE_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin with `start` requests at a time, or `highest` where that is less.

        Args:
            highest: most requests at a time.
            start: requests at a time before anything is known.
            pause_seconds: first pause after a refusal that does not say how long to wait.
            clock: in seconds.
        """
        self.highest = highest
        self.size = float(min(start, highest))
        """Requests at a time, from 1 to `highest`; a share of one more grows in it."""
        self.in_flight = 0
        self.paused_until = 0.0
        """By the clock; nothing is sent before."""
        self.num_decreases = 0
        self._clock, self._pause_seconds = clock, pause_seconds
        self._round = 0
        self._refused_rounds = 0

    def free(self) -> int:
        """Return how many requests may be sent now."""
        if self._clock() < self.paused_until:
            return 0
        return int(self.size) - self.in_flight

    def begin(self) -> int:
        """Count a request as sent; return the round that it belongs to."""
        self.in_flight += 1
        return self._round

    def end(self) -> None:
        """Count a request as finished, whatever became of it."""
        self.in_flight -= 1

    def succeeded(self) -> None:
        """Grow: the server answered; called before `end`."""
        self._refused_rounds = 0
        if self.in_flight * 2 < self.size:
            return  # Nobody wanted more than half of it, so more proves nothing.
        step = 1.0
        if self.num_decreases:
            step = max(1.0, self.highest / _GROWTH_ROUND_TRIPS) / self.size
        self.size = min(self.size + min(step, 1.0), float(self.highest))

    def refused(self, sent_in: int, wait_seconds: float | None) -> float:
        """Shrink: the server says that it is too much; return the seconds of pause from now.

        Args:
            sent_in: the round that `begin` returned for this request.
            wait_seconds: what the server asks to wait; None where it does not say.
        """
        if sent_in == self._round:
            self._round += 1
            self._refused_rounds += 1
            self.num_decreases += 1
            self.size = max(1.0, self.size / 2)
        if wait_seconds is None:
            doubled = self._pause_seconds * 2.0 ** min(self._refused_rounds - 1, 10)
            wait_seconds = min(doubled, _LONGEST_PAUSE_SECONDS) * random.uniform(0.5, 1.0)
        self.paused_until = max(self.paused_until, self._clock() + wait_seconds)
        return self.paused_until - self._clock()


def wait_seconds_of(headers: Mapping[str, str], *, now: datetime | None = None) -> float | None:
    """Return the seconds that a response asks to wait; None where it does not say.

    It reads `retry-after-ms`, `retry-after` in seconds or as an HTTP date, and else the latest
    `anthropic-ratelimit-*-reset` of a limit that has nothing remaining.

    Args:
        headers: of the response, with lower-case names.
        now: the time to count from.
    """
    now = now or datetime.now(UTC)
    for name, unit in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        value = headers.get(name, "").strip()
        if _SECONDS.fullmatch(value):
            return float(value) / unit
    try:
        date = parsedate_to_datetime(headers.get("retry-after", ""))
    except ValueError:
        pass
    else:
        return _seconds_until(date, now)
    waits = [
        _seconds_until(datetime.fromisoformat(value), now)
        for name, value in headers.items()
        if name.startswith("anthropic-ratelimit-")
        and name.endswith("-reset")
        and headers.get(f"{name.removesuffix('-reset')}-remaining") == "0"
        and _is_date(value)
    ]
    return max(waits, default=None)


def _is_date(text: str) -> bool:
    try:
        datetime.fromisoformat(text)
    except ValueError:
        return False
    return True


def _seconds_until(date: datetime, now: datetime) -> float:
    if date.tzinfo is None:
        date = date.replace(tzinfo=UTC)
    seconds = (date - now).total_seconds()
    return seconds if math.isfinite(seconds) and seconds > 0 else 0.0
