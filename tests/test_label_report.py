import pytest
from hypothesis import given
from hypothesis import strategies as st

from srft_prep.critic import CriticRequest, Question
from srft_prep.critic.pricing import Price, Rates
from srft_prep.estimates import estimate
from srft_prep.label_report import estimate_lines, usage_lines
from tests.stages import trajectory

PRICE = Price(input=1.0, output=10.0, cached_input=0.1, cache_write=1.0, batch_factor=0.5)
RUN = trajectory("run", num_steps=6)
OTHER = trajectory("other", num_steps=2)
USAGE = {
    "requests": 1200,
    "trajectories": 1000,
    "steps": 30_000,
    "prompt_tokens": 30_000_000,
    "cached_tokens": 10_000_000,
    "completion_tokens": 400_000,
    "wall_seconds": 100.0,
    "usd": 66.0,
    "flops": 0,
}


def question(prompt_tokens=1000, output_tokens=50):
    return Question(
        system="s",
        shared="",
        rest="",
        schema={},
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        max_output_tokens=999,
    )


def request(run=RUN, *, part="all", steps=None, clipped_tokens=0, **sizes):
    return CriticRequest.of(
        run,
        part=part,
        steps=tuple(range(run.num_steps)) if steps is None else steps,
        clipped_tokens=clipped_tokens,
        question=question(**sizes),
    )


WINDOWS = [
    request(part="steps:0-3@99", steps=(0, 1, 2, 3), clipped_tokens=70),
    request(part="steps:4-5@99", steps=(4, 5), clipped_tokens=7),
    request(OTHER),
]


def test_an_estimate_adds_up_what_is_to_be_asked():
    found = estimate(WINDOWS, Rates())
    assert (found.requests, found.trajectories, found.steps) == (3, 2, 8)
    assert (found.windows, found.clipped_tokens) == (2, 77)
    assert (found.prompt_tokens, found.completion_tokens) == (3000, 150)
    assert found.usd is None
    assert found.seconds is None


@given(st.lists(st.tuples(st.integers(1, 10**6), st.integers(1, 10**4)), max_size=20))
def test_an_estimate_is_priced_request_by_request(sizes):
    asked = [request(prompt_tokens=sent, output_tokens=got) for sent, got in sizes]
    expected = sum(sent * 1.0 + got * 10.0 for sent, got in sizes) / 1e6
    assert estimate(asked, Rates(price=PRICE)).usd == pytest.approx(expected)
    assert estimate(asked, Rates(price=PRICE, batch=True)).usd == pytest.approx(expected / 2)


def test_a_long_prompt_is_priced_as_one():
    dear = Price(
        input=1.0,
        output=0.0,
        cached_input=1.0,
        cache_write=1.0,
        long_prompt_tokens=1500,
        long_input_factor=2.0,
    )
    two = [request(prompt_tokens=1000), request(prompt_tokens=2000)]
    assert estimate(two, Rates(price=dear)).usd == pytest.approx((1000 + 2 * 2000) / 1e6)


def test_the_time_of_a_model_that_runs_here_follows_its_operations_and_so_does_its_cost():
    slow = estimate(WINDOWS, Rates(usd_per_hour=6.0), flops=lambda *_: 1e12, peak_flops=1e12)
    fast = estimate(WINDOWS, Rates(usd_per_hour=6.0), flops=lambda *_: 1e12, peak_flops=1e13)
    assert slow.seconds == pytest.approx(10 * fast.seconds)
    assert slow.seconds > 3
    assert slow.usd == pytest.approx(6.0 * slow.seconds / 3600)


def test_nothing_is_said_of_the_time_of_a_batch():
    assert estimate(WINDOWS, Rates(price=PRICE), hosted=True).seconds > 0
    assert estimate(WINDOWS, Rates(price=PRICE, batch=True), hosted=True).seconds is None


def test_an_estimate_in_words():
    found = estimate(WINDOWS, Rates(price=PRICE))
    assert estimate_lines(found, exact=False) == [
        "to ask: 3 requests about 2 trajectories, 8 steps (2 of the requests are windows; 77 "
        "tokens left out)",
        "tokens: about 3,000 input, about 150 output; counted by bytes, --tokenizer counts tokens",
        "cost: about $0.00, $2.25 for 1,000 trajectories (the paper's critic: $132)",
    ]
    assert estimate_lines(found, exact=True)[1] == "tokens: 3,000 input, about 150 output"


def test_an_estimate_of_nothing_divides_by_nothing():
    found = estimate([], Rates(price=PRICE), hosted=True)
    assert estimate_lines(found, exact=True)[2] == "cost: about $0.00"
    assert found.seconds == 0


def test_usage_in_words():
    assert usage_lines(USAGE) == [
        "asked 1,200 requests in 100.0 s: 1,000 trajectories, 30,000 steps",
        "tokens/s: 200,000 input, 100,000 cached, 4,000 output",
        "cost: $66.00, $66.00 for 1,000 trajectories (the paper's critic: $132)",
    ]


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.04, "0.0 s"), (119.9, "119.9 s"), (120, "2 min"), (7199, "120 min"), (9000, "2.5 h")],
)
def test_times_are_in_seconds_minutes_or_hours(seconds, words):
    assert f" in {words}: " in usage_lines({**USAGE, "wall_seconds": seconds})[0]


def test_mfu_is_told_where_both_of_its_parts_are_known():
    lines = usage_lines({**USAGE, "flops": 2e16}, peak_flops=1e15)
    assert lines[2].startswith("MFU: 20.0%")
    assert "attention included" in lines[2]
    assert not any("MFU" in line for line in usage_lines(USAGE, peak_flops=1e15))
    assert not any("MFU" in line for line in usage_lines({**USAGE, "flops": 2e16}))


def test_a_run_that_asked_nothing_says_nothing():
    assert usage_lines({**USAGE, "requests": 0, "prompt_tokens": 0}) == []
    assert usage_lines({}) == []


def test_what_no_model_counted_is_not_told():
    """The rules have no tokens and cost nothing, and may be done within the clock's tick."""
    free = {**USAGE, "prompt_tokens": 0, "usd": 0, "wall_seconds": 0}
    assert usage_lines(free) == []


def test_money_without_a_finished_trajectory_has_no_price_a_thousand():
    assert usage_lines({**USAGE, "trajectories": 0})[-1] == "cost: $66.00"
