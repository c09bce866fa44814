from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
from hypothesis import given
from hypothesis import strategies as st

from srft_prep.critic import Question
from srft_prep.critic.budget import Budget, most_usd
from srft_prep.critic.pricing import Price, Rates, load_prices

CENTS = st.integers(0, 400).map(lambda units: units / 64)
"""Amounts whose sums are exact, so that nothing has to be forgiven."""
SHARES = st.integers(0, 8).map(lambda eighths: eighths / 8)
ACTS = st.lists(st.tuples(st.booleans(), CENTS, SHARES), max_size=60)
"""Reserve an amount, or settle the oldest reservation at a share of it."""


def reserved(budget):
    return budget._reserved_usd


@given(CENTS, ACTS)
def test_what_is_spent_and_reserved_never_exceeds_the_limit(limit, acts):
    budget = Budget(limit)
    open_amounts = []
    spent = 0.0
    refused = 0
    for reserve, amount, share in acts:
        if reserve:
            fits = spent + sum(open_amounts) + amount <= limit
            assert budget.reserve(amount) is fits
            open_amounts += [amount] if fits else []
            refused += not fits
        elif open_amounts:
            first = open_amounts.pop(0)
            budget.settle(first, first * share)
            spent += first * share
        assert (budget.spent_usd, reserved(budget)) == (spent, sum(open_amounts))
        assert budget.spent_usd + reserved(budget) <= limit
    assert budget.num_refused == refused


@given(st.floats(0, 1e6), st.lists(st.floats(0, 1e6), max_size=40))
def test_amounts_of_any_size_stay_within_the_limit_but_for_rounding(limit, amounts):
    budget = Budget(limit)
    for amount in amounts:
        if budget.reserve(amount):
            budget.settle(amount, amount)
    assert budget.spent_usd <= limit * (1 + 1e-12)


@given(CENTS, CENTS, CENTS)
def test_what_earlier_runs_have_spent_counts(limit, before, amount):
    assert Budget(limit, spent_usd=before).reserve(amount) is (before + amount <= limit)


@given(st.floats(0, 1e300))
def test_no_limit_refuses_nothing(amount):
    assert Budget(None).reserve(amount)


def test_what_a_request_did_not_cost_can_be_spent_on_another():
    budget = Budget(1.0)
    assert budget.reserve(1.0)
    assert not budget.reserve(0.5)
    budget.settle(1.0, 0.25)
    assert budget.reserve(0.75)
    assert not budget.reserve(0.25)
    assert budget.num_refused == 2


@pytest.mark.parametrize("num_threads", [2, 8])
def test_threads_together_get_exactly_what_the_limit_allows(num_threads):
    budget = Budget(1000 / 64)
    together = Barrier(num_threads)

    def spend(_: int) -> tuple[int, float]:
        together.wait(timeout=60)
        taken, most = 0, 0.0
        for turn in range(2000):
            if budget.reserve(1 / 64):
                most = max(most, budget.spent_usd)
                taken += 1
                cost = 1 / 64 if turn % 2 else 0.0
                budget.settle(1 / 64, cost)
        return taken, most

    with ThreadPoolExecutor(num_threads) as pool:
        found = list(pool.map(spend, range(num_threads)))
    assert budget.spent_usd == 1000 / 64
    assert reserved(budget) == 0.0
    assert max(most for _, most in found) <= 1000 / 64
    assert sum(taken for taken, _ in found) + budget.num_refused == num_threads * 2000


def test_threads_that_only_reserve_never_get_more_than_the_limit():
    budget = Budget(500.0)
    together = Barrier(8)

    def reserve(_: int) -> int:
        together.wait(timeout=60)
        return sum(budget.reserve(1.0) for _ in range(200))

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(reserve, range(8))) == 500
    assert budget.num_refused == 8 * 200 - 500


def question(*, prompt_tokens=0, max_output_tokens=0, text="", prompt_ids=None):
    return Question(
        system="",
        shared=text,
        rest="",
        schema={},
        prompt_tokens=prompt_tokens,
        output_tokens=0,
        max_output_tokens=max_output_tokens,
        prompt_ids=prompt_ids,
    )


@given(st.data(), st.sampled_from(sorted(load_prices())), st.booleans())
def test_no_answer_costs_more_than_was_set_aside_for_it(data, model, batch):
    rates = Rates(price=load_prices()[model], batch=batch)
    asked = question(
        prompt_tokens=data.draw(st.integers(0, 400_000)),
        max_output_tokens=data.draw(st.integers(0, 50_000)),
    )
    prompt = data.draw(st.integers(0, asked.prompt_tokens))
    cached = data.draw(st.integers(0, prompt))
    usd = rates.price.usd(
        prompt_tokens=prompt,
        cached_tokens=cached,
        cache_write_tokens=data.draw(st.integers(0, prompt - cached)),
        completion_tokens=data.draw(st.integers(0, asked.max_output_tokens)),
        batch=batch,
    )
    assert usd <= most_usd(asked, rates) * (1 + 1e-12)


def test_an_estimate_of_tokens_is_not_trusted_below_the_bytes():
    price = Price(input=1.0, output=1.0, cached_input=1.0, cache_write=1.0)
    text = "é" * 1000
    estimated = question(prompt_tokens=500, text=text)
    exact = question(prompt_tokens=500, text=text, prompt_ids=(1,) * 500)
    assert most_usd(estimated, Rates(price=price)) == pytest.approx(2000 / 1e6)
    assert most_usd(exact, Rates(price=price)) == pytest.approx(500 / 1e6)


def test_what_is_not_paid_by_tokens_needs_no_money():
    assert most_usd(question(prompt_tokens=1000), Rates(usd_per_hour=3.0)) == 0.0
    assert most_usd(None, Rates(price=load_prices()["gpt-5"])) == 0.0
