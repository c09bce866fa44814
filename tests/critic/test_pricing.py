import re
import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from srft_prep.critic.pricing import PRICES_FILE, Price, load_prices, price_of
from srft_prep.errors import ConfigError

PRICE = Price(input=3.0, output=15.0, cached_input=0.3, cache_write=3.75, batch_factor=0.5)
LONG = Price(
    input=1.0,
    output=10.0,
    cached_input=0.1,
    cache_write=1.25,
    long_prompt_tokens=1000,
    long_input_factor=2.0,
    long_output_factor=1.5,
)


def write(folder, text):
    path = folder / "prices.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_every_kind_of_token_has_its_own_price():
    usd = PRICE.usd(
        prompt_tokens=10_000, cached_tokens=6_000, cache_write_tokens=3_000, completion_tokens=500
    )
    assert usd == pytest.approx((1_000 * 3 + 6_000 * 0.3 + 3_000 * 3.75 + 500 * 15) / 1e6)


def test_a_batch_costs_its_part_of_all_that():
    live = PRICE.usd(prompt_tokens=10_000, completion_tokens=500)
    assert PRICE.usd(prompt_tokens=10_000, completion_tokens=500, batch=True) == live / 2


def test_a_long_prompt_makes_the_whole_request_dearer_and_one_at_the_limit_does_not():
    at_limit = LONG.usd(prompt_tokens=1000, completion_tokens=100)
    above = LONG.usd(prompt_tokens=1001, cached_tokens=1000, completion_tokens=100)
    assert at_limit == pytest.approx((1000 * 1.0 + 100 * 10.0) / 1e6)
    assert above == pytest.approx((2.0 * (1 * 1.0 + 1000 * 0.1) + 1.5 * 100 * 10.0) / 1e6)


@given(st.data(), st.sampled_from([PRICE, LONG]), st.booleans())
def test_no_use_of_the_cache_costs_more_than_writing_all_of_it(data, price, batch):
    prompt = data.draw(st.integers(0, 5000))
    cached = data.draw(st.integers(0, prompt))
    written = data.draw(st.integers(0, prompt - cached))
    received = data.draw(st.integers(0, 5000))
    most = price.usd(
        prompt_tokens=prompt, cache_write_tokens=prompt, completion_tokens=received, batch=batch
    )
    usd = price.usd(
        prompt_tokens=prompt,
        cached_tokens=cached,
        cache_write_tokens=written,
        completion_tokens=received,
        batch=batch,
    )
    assert 0 <= usd <= most * (1 + 1e-12)


def test_a_provider_that_reports_more_cached_tokens_than_sent_earns_no_refund():
    cached_only = PRICE.usd(prompt_tokens=120, cached_tokens=120)
    assert PRICE.usd(prompt_tokens=100, cached_tokens=120) == cached_only


@pytest.mark.parametrize(
    ("model", "entry"),
    [
        ("gpt-5", "gpt-5"),
        ("gpt-5-2025-08-07", "gpt-5"),
        ("gpt-5-mini-2025-08-07", "gpt-5-mini"),
        ("gpt-5-latest", "gpt-5"),
        ("gpt-4.1-mini", "gpt-4.1-mini"),
        ("gpt-4.1", "gpt-4.1"),
        ("claude-sonnet-4-20250514", "claude-sonnet-4"),
        ("claude-sonnet-4@20250514", "claude-sonnet-4"),
        ("claude-sonnet-4-20250514@a-revision", "claude-sonnet-4"),
        ("claude-sonnet-4-5-20250929", "claude-sonnet-4-5"),
        ("claude-haiku-4-5-20251001", "claude-haiku-4-5"),
    ],
)
def test_a_dated_version_has_the_price_of_its_model(model, entry):
    prices = load_prices()
    numbered = {name: Price(input=n, output=n, cached_input=n, cache_write=n)
                for n, name in enumerate(prices)}  # fmt: skip
    assert price_of(model, numbered) is numbered[entry]


@pytest.mark.parametrize(
    "model",
    [
        "gpt-5-pro",
        "gpt-5.2",
        "gpt-5.2-pro",
        "gpt-5-codex",
        "gpt-5-20",
        "gpt-4.1-mini-fast",
        "openai/gpt-5",
        "claude-sonnet-4-7",
        "claude-opus",
        "o4-mini-deep-research",
        "Qwen/Qwen3-Coder-30B-A3B-Instruct",
        "",
    ],
)
def test_another_model_with_a_name_alike_has_no_price(model):
    assert price_of(model, load_prices()) is None


def test_entries_of_a_file_of_ones_own_may_leave_out_all_but_input_and_output(tmp_path):
    path = write(tmp_path, '["my-model"]\ninput = 2\noutput = 8.5\n')
    assert load_prices(path) == {
        "my-model": Price(input=2, output=8.5, cached_input=2, cache_write=2)
    }


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('["m"]\ninput = 2\n', "m: expected input and output.*got input"),
        ('["m"]\ninput = 2\noutput = 8\nofset = 1\n', "got input, output, ofset"),
        ('["m"]\ninput = "2"\noutput = 8\n', "m: input: expected a number from 0, got '2'"),
        ('["m"]\ninput = -2\noutput = 8\n', "m: input: .*got -2"),
        ('["m"]\ninput = nan\noutput = 8\n', "m: input: .*got nan"),
        ('["m"]\ninput = true\noutput = 8\n', "m: input: .*got True"),
        (
            '["m"]\ninput = 1\noutput = 8\nlong_prompt_tokens = 1.5\n',
            "whole number from 0, got 1.5",
        ),
        ("gpt-4.1 = { input = 2, output = 8 }\n", "stands in quotes"),
        ("m = 3\n", "m: expected input and output.*got 3"),
        ("m = \n", "expected a table of prices in TOML"),
    ],
)
def test_a_wrong_entry_is_named(tmp_path, text, said):
    path = write(tmp_path, text)
    with pytest.raises(ConfigError, match=f"^{re.escape(str(path))}: .*{said}"):
        load_prices(path)


def test_a_missing_table_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.toml: expected a table of prices: No such"):
        load_prices(tmp_path / "nowhere.toml")


def test_every_price_of_the_package_follows_a_page_that_it_was_read_from():
    page = None
    for line in PRICES_FILE.read_text(encoding="utf-8").splitlines():
        if line.startswith("# ---"):
            page = None
        elif line.startswith("#"):
            page = page or re.search(r"https://\S+", line)
        elif line:
            assert page, f"no page is cited for {line.partition(' ')[0]}"


def test_caches_and_batches_of_the_package_are_never_dearer_than_what_they_spare():
    for name, price in load_prices().items():
        assert 0 < price.cached_input < price.input <= price.cache_write < price.output, name
        assert price.batch_factor in (0.5, 1.0), name
        assert (price.long_prompt_tokens is None) == (price.long_input_factor == 1.0), name


def test_the_papers_critic_is_in_the_table():
    assert tomllib.loads(PRICES_FILE.read_text())["claude-sonnet-4"]["input"] == 3.00
