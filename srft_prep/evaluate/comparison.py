"""Is one arm better than another, or is it noise: means, pass@k, intervals, power.

The default interval of a difference draws training runs and, within each, rollouts. The one that
draws rollouts alone ("paper-compatible", as in the paper's appendix B) takes the trained models as
given, and is too narrow for a statement about a recipe. Rates are in percent, differences in
points, standard deviations over n - 1 (as the combined rows of the paper's Table 4 are).
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist, mean, stdev
from typing import Final

import numpy as np

from srft_prep.errors import ConfigError
from srft_prep.evaluate.intervals import (
    CONFIDENCE,
    Interval,
    Rates,
    generator,
    hierarchical_means,
    percentile_interval,
    pooled_means,
    welch,
)
from srft_prep.evaluate.rollouts import Arm, Rollout

POWER: Final = 0.8
ENOUGH_RUNS: Final = 3
"""Training runs an arm below which an interval over training runs says little."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """An arm, or one of its training runs: a row of the paper's Table 4."""

    num_runs: int
    num_rollouts: int
    mean: float
    sd: float | None
    """Over rollouts; None with one."""
    pass_at: dict[int, float]
    """By k, in percent; of an arm, the mean of its training runs', as in Table 4."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """One arm against another."""

    arm: str
    baseline: str
    hierarchical: Interval
    welch: Interval | None
    """None where an arm has one training run."""
    rollouts_only: Interval


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """How much rates vary, pooled over all arms."""

    between_runs: float | None
    """Variance of training runs' true rates; None where no arm has two runs."""
    within_runs: float | None
    """Variance of rollouts of one model; None where no training run has two rollouts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """All that `compare` tells."""

    num_instances: int
    arms: dict[str, Summary]
    runs: dict[str, dict[str, Summary]]
    differences: list[Difference]
    spread: Spread
    gain: float
    needed_runs: dict[int, int]
    """Training runs an arm that settle `gain`, by rollouts a run."""
    warnings: list[str]


def compare(
    arms: Sequence[Arm],
    *,
    baseline: str | None = None,
    ks: Sequence[int] = (),
    samples: int = 10_000,
    seed: int = 0,
    gain: float = 1.0,
) -> Comparison:
    """Return what the rollouts of `arms` say.

    Args:
        arms: as `read_arms` returns them.
        baseline: the arm that all others are held against; each pair where it is None.
        ks: the k of pass@k; all that the rollouts allow where it is empty.
        samples: bootstrap samples.
        seed: of the bootstrap.
        gain: the difference in points for the power estimate.

    Raises:
        ConfigError: no such baseline, or a k above the number of rollouts of a training run.
    """
    names = [arm.name for arm in arms]
    if baseline is not None and baseline not in names:
        raise ConfigError(f"--baseline {baseline}: no such arm; expected one of {', '.join(names)}")
    fewest = min(len(run) for arm in arms for run in arm.runs.values())
    if ks and max(ks) > fewest:
        raise ConfigError(
            f"--k {max(ks)}: a training run has {fewest} rollouts, and pass@k needs at least k"
        )
    runs = {arm.name: {run: _of_run(them, ks) for run, them in arm.runs.items()} for arm in arms}
    rates = {arm.name: rates_of(arm) for arm in arms}
    spread = measure_spread(list(rates.values()))
    needed = {
        rollouts: found
        for rollouts in sorted({1, 3, 7, fewest})
        if (found := runs_needed(gain, spread, rollouts)) is not None
    }
    return Comparison(
        num_instances=arms[0].rollouts[0].num_instances,
        arms={arm.name: _of_arm(arm, runs[arm.name]) for arm in arms},
        runs=runs,
        differences=differences(rates, baseline=baseline, samples=samples, seed=seed),
        spread=spread,
        gain=gain,
        needed_runs=needed,
        warnings=_warnings(arms, num_samples=samples),
    )


def differences(
    rates: dict[str, Rates], *, baseline: str | None, samples: int, seed: int
) -> list[Difference]:
    """Return each arm against `baseline`, or each later arm against each earlier one."""
    hierarchical, pooled = {}, {}
    for name, runs in rates.items():
        hierarchical[name] = hierarchical_means(runs, samples, generator(seed, name))
        pooled[name] = pooled_means(runs, samples, generator(seed, name))
    names = list(rates)
    pairs = [(arm, other) for i, arm in enumerate(names) for other in names[:i]]
    if baseline is not None:
        pairs = [(arm, baseline) for arm in names if arm != baseline]
    found = []
    for arm, other in pairs:
        difference = _mean(rates[arm]) - _mean(rates[other])
        found.append(
            Difference(
                arm=arm,
                baseline=other,
                hierarchical=percentile_interval(
                    difference, hierarchical[arm], hierarchical[other]
                ),
                welch=welch(rates[arm], rates[other]),
                rollouts_only=percentile_interval(difference, pooled[arm], pooled[other]),
            )
        )
    return found


def pass_at_k(rollouts: Sequence[Rollout], k: int) -> float:
    """Return the share of instances, in percent, that one of k rollouts resolves: unbiased.

    1 - C(n-c, k) / C(n, k) for an instance that c of n rollouts resolved, averaged over instances
    (Chen et al. 2021, arXiv:2107.03374). An instance that none resolved adds nothing.
    """
    n = len(rollouts)
    solved = Counter(instance for rollout in rollouts for instance in rollout.resolved)
    by_count = Counter(solved.values())
    total = sum(
        number * (1 - math.comb(n - c, k) / math.comb(n, k)) for c, number in by_count.items()
    )
    return 100 * total / rollouts[0].num_instances


def measure_spread(arms: Sequence[Rates]) -> Spread:
    """Return the variances between and within training runs, pooled over all arms.

    One-way random-effects analysis of variance: the mean square within runs estimates the variance
    of rollouts, the mean square between runs of an arm that plus n0 times the variance of runs,
    with n0 = (N - sum n^2 / N) / (R - 1) for unequal numbers of rollouts (Searle, Casella and
    McCulloch, Variance Components, 1992, chapter 3). A negative estimate is taken as 0.
    """
    within_squares = between_squares = weight = 0.0
    within_freedom = between_freedom = 0
    for runs in arms:
        sizes = [len(run) for run in runs]
        centre = _mean(runs)
        within_freedom += sum(sizes) - len(sizes)
        between_freedom += len(sizes) - 1
        within_squares += sum((rate - mean(run)) ** 2 for run in runs for rate in run)
        between_squares += sum(len(run) * (mean(run) - centre) ** 2 for run in runs)
        weight += sum(sizes) - sum(size * size for size in sizes) / sum(sizes)
    within = within_squares / within_freedom if within_freedom else None
    if not between_freedom:
        return Spread(between_runs=None, within_runs=within)
    # the sum of squares between runs is expected to be freedom * within + weight * between
    between = (between_squares - between_freedom * (within or 0.0)) / weight
    return Spread(between_runs=max(0.0, between), within_runs=within)


def runs_needed(gain: float, spread: Spread, rollouts: int) -> int | None:
    """Return the training runs an arm that settle a true difference of `gain` points.

    By the normal approximation, two-sided at 95% with a power of 80%, for R runs of m rollouts:

        R = 2 (z_.975 + z_.8)^2 (between + within / m) / gain^2

    which is the sample size of a trial randomized by clusters (Donner and Klar, Design and Analysis
    of Cluster Randomization Trials, 2000, chapter 5) with runs as clusters; at least
    `ENOUGH_RUNS`, below which the approximation means nothing. None where a variance is not known.
    """
    if spread.between_runs is None or spread.within_runs is None:
        return None
    normal = NormalDist()
    z = normal.inv_cdf((1 + CONFIDENCE) / 2) + normal.inv_cdf(POWER)
    runs = 2 * z * z * (spread.between_runs + spread.within_runs / rollouts) / gain**2
    return max(ENOUGH_RUNS, math.ceil(runs))


def rates_of(arm: Arm) -> Rates:
    """Return the rates of an arm's rollouts, by training run."""
    return [[rollout.rate for rollout in rollouts] for rollouts in arm.runs.values()]


def _mean(runs: Rates) -> float:
    return float(np.mean([rate for run in runs for rate in run]))


def _of_run(rollouts: Sequence[Rollout], ks: Sequence[int]) -> Summary:
    rates = [rollout.rate for rollout in rollouts]
    return Summary(
        num_runs=1,
        num_rollouts=len(rates),
        mean=mean(rates),
        sd=stdev(rates) if len(rates) > 1 else None,
        pass_at={k: pass_at_k(rollouts, k) for k in ks or range(1, len(rates) + 1)},
    )


def _of_arm(arm: Arm, runs: dict[str, Summary]) -> Summary:
    rates = [rollout.rate for rollout in arm.rollouts]
    shared = min((summary.pass_at for summary in runs.values()), key=len)
    return Summary(
        num_runs=len(runs),
        num_rollouts=len(rates),
        mean=mean(rates),
        sd=stdev(rates) if len(rates) > 1 else None,
        pass_at={k: mean(summary.pass_at[k] for summary in runs.values()) for k in shared},
    )


def _warnings(arms: Sequence[Arm], *, num_samples: int) -> list[str]:
    found = []
    for arm in arms:
        if len(arm.runs) < ENOUGH_RUNS:
            word = "run" if len(arm.runs) == 1 else "runs"
            found.append(
                f"{arm.name}: {len(arm.runs)} training {word}; below {ENOUGH_RUNS} an arm, "
                "intervals are too narrow: train it again with another seed"
            )
        short = [
            rollout for rollout in arm.rollouts if rollout.num_submitted < rollout.num_instances
        ]
        if short:
            missing = sum(rollout.num_instances - rollout.num_submitted for rollout in short)
            found.append(
                f"{arm.name}: {missing} instances without an answer in {len(short)} of "
                f"{len(arm.rollouts)} rollouts count as not resolved"
            )
    if num_samples < 1000:
        found.append(f"{num_samples} bootstrap samples: the ends of intervals are rough")
    return found
