"""The adaptive limit, on a clock that the test turns."""

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from srft_prep.critic.api.concurrency import AdaptiveLimit, wait_seconds_of

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_the_refusals_of_one_round_trip_halve_the_limit_once() -> None:
    limit = AdaptiveLimit(100, start=64, clock=Clock())
    sent = [limit.begin() for _ in range(64)]
    for round_ in sent:
        limit.refused(round_, 1.0)
        limit.end()
    assert limit.size == 32
    limit.refused(limit.begin(), 1.0)
    assert limit.size == 16


def test_nothing_is_free_until_the_pause_is_over() -> None:
    clock = Clock()
    limit = AdaptiveLimit(8, clock=clock)
    limit.refused(limit.begin(), 30.0)
    limit.end()
    assert limit.free() == 0
    clock.now += 30.0
    assert limit.free() == 4


def test_pauses_double_where_the_server_does_not_say_how_long() -> None:
    clock = Clock()
    limit = AdaptiveLimit(8, clock=clock)
    pauses = []
    for _ in range(12):
        pauses.append(limit.refused(limit.begin(), None))
        limit.end()
        clock.now = limit.paused_until
    assert 0.25 <= pauses[0] <= 0.5
    assert 30.0 <= pauses[-1] <= 60.0


def test_the_limit_doubles_until_the_first_refusal_and_then_grows_by_steps() -> None:
    limit = AdaptiveLimit(64, start=4, clock=Clock())
    assert round_trip(limit) == 8
    assert round_trip(limit) == 16
    limit.refused(limit.begin(), 0.0)
    limit.end()
    assert limit.size == 8
    assert 9.5 < round_trip(limit) <= 10
    for _ in range(64):
        round_trip(limit)
    assert limit.size == 64


def test_a_limit_that_nobody_uses_does_not_grow() -> None:
    limit = AdaptiveLimit(64, start=16, clock=Clock())
    for _ in range(100):
        limit.begin()
        limit.succeeded()
        limit.end()
    assert limit.size == 16


@given(st.lists(st.sampled_from(["begin", "good", "bad"]), max_size=200), st.integers(1, 300))
def test_the_limit_stays_between_one_and_the_highest(events: list[str], highest: int) -> None:
    limit = AdaptiveLimit(highest, clock=Clock())
    rounds: list[int] = []
    for event in events:
        if event == "begin":
            rounds.append(limit.begin())
        elif rounds:
            limit.succeeded() if event == "good" else limit.refused(rounds[-1], None)
            rounds.pop()
            limit.end()
        assert 1 <= limit.size <= highest
        assert limit.in_flight == len(rounds)


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "7"}, 7.0),
        ({"retry-after": "0.5"}, 0.5),
        ({"retry-after": "Fri, 02 Jan 2026 03:05:05 GMT"}, 60.0),
        ({"retry-after": "Fri, 02 Jan 2026 03:00:00 GMT"}, 0.0),
        ({"retry-after": "soon"}, None),
        ({"retry-after-ms": "250", "retry-after": "9"}, 0.25),
        (
            {
                "anthropic-ratelimit-requests-remaining": "0",
                "anthropic-ratelimit-requests-reset": "2026-01-02T03:04:25Z",
                "anthropic-ratelimit-tokens-remaining": "10",
                "anthropic-ratelimit-tokens-reset": "2026-01-02T04:04:25Z",
            },
            20.0,
        ),
        (
            {
                "anthropic-ratelimit-requests-remaining": "0",
                "anthropic-ratelimit-requests-reset": "later",
            },
            None,
        ),
    ],
)
def test_what_a_response_asks_to_wait(headers: dict[str, str], seconds: float | None) -> None:
    assert wait_seconds_of(headers, now=NOW) == seconds


def round_trip(limit: AdaptiveLimit) -> float:
    """Answer as many requests as may be under way; return the limit after that."""
    count = limit.free()
    for _ in range(count):
        limit.begin()
    for _ in range(count):
        limit.succeeded()
    for _ in range(count):
        limit.end()
    return limit.size
