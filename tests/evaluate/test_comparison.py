"""Numbers against brute force, published tables, the paper, and simulated studies."""

import json
import math
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from random import Random
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from srft_prep.cli import cli
from srft_prep.errors import ConfigError
from srft_prep.evaluate.comparison import (
    Spread,
    compare,
    differences,
    measure_spread,
    pass_at_k,
    rates_of,
    runs_needed,
)
from srft_prep.evaluate.intervals import (
    generator,
    hierarchical_means,
    incomplete_beta,
    t_quantile,
)
from srft_prep.evaluate.page import page as comparison_page
from srft_prep.evaluate.rollouts import COLUMNS, Arm, Rollout, read_arms
from tests.page_reader import read_page

INSTANCES = [f"repo__{number}" for number in range(20)]


def rollout(resolved: set[str], *, run: str = "run", name: str = "a") -> Rollout:
    return Rollout(
        training_run=run,
        name=name,
        resolved=frozenset(resolved),
        instances=frozenset(INSTANCES),
        num_instances=len(INSTANCES),
        num_submitted=len(INSTANCES),
        source=f"{run}/{name}.json",
    )


def arm(name: str, *, runs: int, rollouts: int, seed: int, rate: float = 0.4) -> Arm:
    random = np.random.default_rng(seed)
    found = {}
    for run in range(runs):
        drawn = random.random((rollouts, len(INSTANCES))) < rate
        found[f"seed{run}"] = tuple(
            rollout(
                {one for one, good in zip(INSTANCES, row, strict=True) if good},
                run=f"seed{run}",
                name=str(number),
            )
            for number, row in enumerate(drawn)
        )
    return Arm(name=name, runs=found)


def rates_with(mean: float, sd: float, count: int = 7) -> list[float]:
    """Rates with exactly this mean and standard deviation, spread as a normal sample is."""
    values = np.array([NormalDist().inv_cdf((i + 0.5) / count) for i in range(count)])
    return list(mean + sd * values / values.std(ddof=1))


@given(st.lists(st.sets(st.sampled_from(INSTANCES)), min_size=1, max_size=6), st.data())
def test_pass_at_k_is_the_share_over_all_choices_of_k_rollouts(
    resolved: list[set[str]], data: st.DataObject
) -> None:
    k = data.draw(st.integers(1, len(resolved)))
    choices = list(combinations(resolved, k))
    expected = sum(len(set().union(*chosen)) for chosen in choices) / len(choices)
    found = pass_at_k([rollout(one) for one in resolved], k)
    assert found == pytest.approx(100 * expected / len(INSTANCES), abs=1e-9)


@pytest.mark.parametrize(
    ("probability", "freedom", "value"),
    [  # the usual printed table; one and two degrees of freedom are exact in closed form below
        (0.975, 3, 3.182446305284263),
        (0.975, 5, 2.570581835636314),
        (0.975, 10, 2.228138851964939),
        (0.975, 30, 2.042272456301238),
        (0.95, 4, 2.131846786326649),
        (0.995, 8, 3.355387331333395),
    ],
)
def test_t_quantiles_are_those_of_the_tables(
    probability: float, freedom: float, value: float
) -> None:
    assert t_quantile(probability, freedom) == pytest.approx(value, rel=1e-10)


@given(st.floats(0.55, 0.999))
def test_t_quantiles_agree_with_closed_forms(p: float) -> None:
    assert t_quantile(p, 1) == pytest.approx(math.tan(math.pi * (p - 0.5)), rel=1e-9)
    two = (2 * p - 1) * math.sqrt(2 / (4 * p * (1 - p)))
    assert t_quantile(p, 2) == pytest.approx(two, rel=1e-9)
    assert t_quantile(p, 1e7) == pytest.approx(NormalDist().inv_cdf(p), rel=1e-5)


@given(st.integers(1, 60), st.integers(1, 60), st.floats(0.01, 0.99))
def test_the_incomplete_beta_is_its_integral(m: int, n: int, x: float) -> None:
    # with t = sin^2(u) the integrand is 2 sin(u)^(m-1) cos(u)^(n-1) for a = m/2, b = n/2: smooth
    points, weights = np.polynomial.legendre.leggauss(200)
    top = math.asin(math.sqrt(x))
    u = top * (points + 1) / 2
    log_beta = math.lgamma(m / 2) + math.lgamma(n / 2) - math.lgamma((m + n) / 2)
    density = 2 * np.sin(u) ** (m - 1) * np.cos(u) ** (n - 1) / math.exp(log_beta)
    assert incomplete_beta(m / 2, n / 2, x) == pytest.approx(top / 2 * weights @ density, abs=1e-10)


@given(st.floats(0.1, 1000), st.floats(0.0, 1.0))
def test_the_incomplete_beta_agrees_with_its_closed_forms(a: float, x: float) -> None:
    assert incomplete_beta(a, 1, x) == pytest.approx(x**a, rel=1e-9, abs=1e-12)
    assert incomplete_beta(1, a, x) == pytest.approx(1 - (1 - x) ** a, rel=1e-9, abs=1e-12)


UNMASKED = [rates_with(28.8, 1.0), rates_with(27.7, 0.9), rates_with(29.1, 1.0)]
MASKED = [rates_with(29.8, 0.6), rates_with(29.5, 1.5)]


def test_the_papers_means_and_deviations_give_the_papers_intervals() -> None:
    rates = {"unmasked": UNMASKED, "masked": MASKED}
    (found,) = differences(rates, baseline="unmasked", samples=20_000, seed=0)
    assert found.hierarchical.difference == pytest.approx(1.1, abs=0.05)
    assert found.rollouts_only.low == pytest.approx(0.4, abs=0.15)
    assert found.rollouts_only.high == pytest.approx(1.8, abs=0.15)
    assert found.hierarchical.low == pytest.approx(0.14, abs=0.15)
    assert found.hierarchical.high == pytest.approx(2.09, abs=0.15)
    assert found.welch is not None
    assert found.welch.low == pytest.approx(-0.52, abs=0.01)
    assert found.welch.high == pytest.approx(2.75, abs=0.01)


def test_the_papers_main_result_gives_its_interval_and_no_welch_interval() -> None:
    rates = {"rft": [rates_with(30.9, 1.1)], "srft": [rates_with(32.2, 0.9)]}
    (found,) = differences(rates, baseline="rft", samples=20_000, seed=0)
    assert found.rollouts_only.low == pytest.approx(0.4, abs=0.15)
    assert found.rollouts_only.high == pytest.approx(2.3, abs=0.15)
    assert found.hierarchical == found.rollouts_only
    assert found.welch is None


@pytest.mark.parametrize(("runs", "between"), [(3, 0.6), (3, 0.3), (5, 0.6)])
def test_the_default_interval_covers_the_true_gain_in_nine_of_ten_studies(
    runs: int, between: float
) -> None:
    random = np.random.default_rng(20)
    covered = 0
    for study in range(500):
        rates = {}
        for name, centre in (("a", 28.5), ("b", 29.6)):
            means = centre + between * random.standard_normal((runs, 1))
            rates[name] = (means + 1.1 * random.standard_normal((runs, 7))).tolist()
        (found,) = differences(rates, baseline="a", samples=1000, seed=study)
        covered += found.hierarchical.low <= 1.1 <= found.hierarchical.high
    assert covered >= 450


def test_identical_arms_have_no_difference_and_intervals_about_it() -> None:
    for seed in range(5):
        one = arm("one", runs=3, rollouts=4, seed=seed)
        (found,) = compare([one, Arm(name="two", runs=one.runs)], samples=2000).differences
        for interval in (found.hierarchical, found.welch, found.rollouts_only):
            assert interval is not None
            assert interval.low < interval.difference == 0 < interval.high


def test_swapping_arms_negates_and_the_same_seed_repeats() -> None:
    arms = [arm("one", runs=3, rollouts=4, seed=1), arm("two", runs=2, rollouts=3, seed=2)]
    (forth,) = compare(arms, baseline="one").differences
    (back,) = compare(arms[::-1], baseline="two").differences
    for name in ("hierarchical", "welch", "rollouts_only"):
        one, other = getattr(forth, name), getattr(back, name)
        expected = (-other.difference, -other.high, -other.low)
        assert (one.difference, one.low, one.high) == pytest.approx(expected, abs=1e-9)
    assert compare(arms, seed=5) == compare(arms, seed=5)
    assert compare(arms, seed=5).differences != compare(arms, seed=6).differences


@given(st.randoms(use_true_random=False))
def test_the_order_of_a_tables_rows_changes_no_number(
    tmp_path_factory: pytest.TempPathFactory, shuffler: Random
) -> None:
    rows = [
        ("x", one.training_run, one.name, instance, int(instance in one.resolved))
        for one in arm("x", runs=3, rollouts=2, seed=7).rollouts
        for instance in INSTANCES
    ]
    found = []
    for order in (rows, shuffler.sample(rows, len(rows))):
        path = tmp_path_factory.mktemp("table") / "t.csv"
        lines = [",".join(map(str, row)) for row in (COLUMNS, *order)]
        path.write_text("\n".join(lines))
        arms = [*read_arms([("x", path)]), arm("y", runs=2, rollouts=3, seed=8)]
        found.append(compare(arms, samples=200))
    assert found[0] == found[1]


def test_without_a_baseline_each_pair_is_compared_once() -> None:
    arms = [arm(name, runs=1, rollouts=2, seed=1) for name in "abc"]
    pairs = [(one.arm, one.baseline) for one in compare(arms, samples=200).differences]
    assert pairs == [("b", "a"), ("c", "a"), ("c", "b")]
    pairs = [(d.arm, d.baseline) for d in compare(arms, baseline="b", samples=200).differences]
    assert pairs == [("a", "b"), ("c", "b")]


def test_the_spread_is_estimated_without_bias_from_unequal_runs() -> None:
    random = np.random.default_rng(3)
    found = []
    for _ in range(2000):
        arms = [
            [
                list(centre + 2 * random.standard_normal() + 1.5 * random.standard_normal(size))
                for size in (2, 5, 9)
            ]
            for centre in (20, 40)
        ]
        found.append(measure_spread(arms))
    # 4 between runs (cut at 0, hence a little more) and 2.25 within
    assert np.mean([one.within_runs for one in found]) == pytest.approx(2.25, rel=0.03)
    assert np.mean([one.between_runs for one in found]) == pytest.approx(4, rel=0.1)


def test_the_runs_said_to_settle_a_gain_settle_it_in_four_of_five_studies() -> None:
    needed = runs_needed(1.0, Spread(between_runs=0.36, within_runs=1.21), 7)
    assert needed == 9
    random = np.random.default_rng(4)
    error = math.sqrt(2 * (0.36 + 1.21 / 7) / needed)
    gains = 1.0 + error * random.standard_normal(20_000)
    assert 0.79 < np.mean(gains > 1.96 * error) < 0.86  # runs are whole: a little above .8


def test_power_is_unknown_where_a_spread_is_unknown() -> None:
    assert measure_spread([[[1.0, 2.0]], [[3.0, 4.0]]]).between_runs is None
    assert measure_spread([[[1.0], [2.0]]]).within_runs is None
    assert compare([arm("a", runs=1, rollouts=7, seed=1)]).needed_runs == {}


def test_few_training_runs_and_missing_answers_are_warned_of() -> None:
    assert compare([arm("a", runs=3, rollouts=2, seed=1)]).warnings == []
    (warning,) = compare([arm("a", runs=2, rollouts=2, seed=1)]).warnings
    assert "2 training runs" in warning
    whole = arm("a", runs=3, rollouts=2, seed=1)
    short = replace(whole.runs["seed1"][0], num_submitted=17)
    runs = {**whole.runs, "seed1": (short, whole.runs["seed1"][1])}
    (warning,) = compare([Arm(name="a", runs=runs)]).warnings
    assert "3 instances without an answer in 1 of 6 rollouts" in warning


def test_a_k_or_a_baseline_that_is_not_there_is_refused() -> None:
    arms = [arm("a", runs=2, rollouts=3, seed=1)]
    with pytest.raises(ConfigError, match="a training run has 3 rollouts"):
        compare(arms, ks=[4])
    with pytest.raises(ConfigError, match="no such arm; expected one of a"):
        compare(arms, baseline="b")


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """Two arms of rollouts as SWE-bench writes them."""
    for name, runs, rate in (("naive", 3, 0.35), ("masked", 2, 0.5)):
        for one in arm(name, runs=runs, rollouts=4, seed=runs, rate=rate).rollouts:
            folder = tmp_path / name / one.training_run
            folder.mkdir(parents=True, exist_ok=True)
            summary = {
                "total_instances": len(INSTANCES),
                "submitted_ids": INSTANCES,
                "resolved_ids": sorted(one.resolved),
            }
            (folder / f"{one.name}.json").write_text(json.dumps(summary))
    return tmp_path


def arguments(study: Path) -> list[str]:
    arms = [f"--arm={name}={study / name}" for name in ("naive", "masked")]
    return ["compare", *arms, "--baseline", "naive"]


def test_the_report_reads_as_it_should(study: Path, golden: Any) -> None:
    run = CliRunner().invoke(cli, [*arguments(study), "--gain", "5"], catch_exceptions=False)
    assert run.exit_code == 0
    golden.check("compare.txt", run.output)


def test_the_last_line_holds_every_number_as_json(study: Path) -> None:
    run = CliRunner().invoke(cli, [*arguments(study), "--json", "--k=1", "--k=3"])
    found = json.loads(run.output.splitlines()[-1])
    assert list(found["arms"]["masked"]["pass_at"]) == ["1", "3"]
    assert found["differences"][0]["hierarchical"]["low"] < found["differences"][0]["welch"]["high"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--arm", "x"], "expected NAME=PATH"),
        (["--arm", "x=/nowhere"], "/nowhere does not exist"),
        ([], "Missing option '--arm'"),
    ],
)
def test_an_arm_that_cannot_be_is_a_usage_error(words: list[str], says: str) -> None:
    run = CliRunner().invoke(cli, ["compare", *words])
    assert run.exit_code == 2
    assert says in run.output


def test_the_page_has_the_plots_and_the_numbers_of_the_text(study: Path, tmp_path: Path) -> None:
    file = tmp_path / "made" / "compare.html"
    words = arguments(study)
    run = CliRunner().invoke(cli, [*words, "--html", str(file)], catch_exceptions=False)
    assert run.output == CliRunner().invoke(cli, words).output
    text = file.read_text(encoding="utf-8")
    page = read_page(text)
    assert page.problems() == []
    assert page.scripts == []
    assert [tag for tag, _ in page.elements].count("svg") == 3
    ids = [found["id"] for _, found in page.elements if "id" in found]
    assert len(ids) == len(set(ids))
    for number in ("31.7 ± 7.2", "48.8 ± 11.9", "[8.33, 28.33]", "[9.38, 26.88]", "+17.08", "78.3"):
        assert number in run.output
        assert number in page.text
    assert "warning: " + "masked: 2 training runs" in run.output
    assert "masked: 2 training runs" in page.text
    again = CliRunner().invoke(cli, [*words, "--html", str(file)])
    assert again.exit_code == 0
    assert file.read_text(encoding="utf-8") == text


def test_the_bootstrap_plot_draws_the_samples_that_the_intervals_come_from(study: Path) -> None:
    arms = read_arms([(name, study / name) for name in ("naive", "masked")])
    found = compare(arms, baseline="naive", samples=2000, seed=3)
    page = read_page(comparison_page(found, arms, samples=2000, seed=3))
    drawn = [hierarchical_means(rates_of(one), 2000, generator(3, one.name)) for one in arms]
    interval = found.differences[0].hierarchical
    assert np.quantile(drawn[1] - drawn[0], [0.025, 0.975]).tolist() == [
        interval.low,
        interval.high,
    ]
    for one, means in zip(arms, drawn, strict=True):
        low, high = np.quantile(means, [0.025, 0.975])
        assert f"{one.name}: {low:.1f} to {high:.1f}" in page.text


def test_names_of_arms_are_text_and_one_arm_alone_makes_a_page() -> None:
    name = "</svg><script>alert(1)</script>$x^{$\x1b\u202e"
    arms = [arm(name, runs=1, rollouts=1, seed=1)]
    page = read_page(comparison_page(compare(arms), arms, samples=100, seed=0))
    assert page.problems() == []
    assert r"</svg><script>alert(1)</script>$x^{$\x1b\u202e" in page.text
    assert not any(char in page.text for char in "\x1b\u202e")
