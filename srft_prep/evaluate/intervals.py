"""Intervals for the difference of two arms, from the rates of their rollouts.

Two things vary: a model answers otherwise each time it is asked (rollouts), and the same recipe
gives another model each time it is trained (training runs). Instances are the same in every rollout
and are not drawn anew: their difficulty cancels in a difference, and intervals speak of this
benchmark. An arm's rates are its rollouts' rates by training run; its mean is over its rollouts.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

CONFIDENCE: Final = 0.95

Rates = Sequence[Sequence[float]]
"""Rates of an arm: for each training run, those of its rollouts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A difference and the interval about it, in the rates' unit."""

    difference: float
    low: float
    high: float


def generator(seed: int, arm: str) -> np.random.Generator:
    """Return an arm's own source of chance, so that the order of arms changes no number."""
    name = int.from_bytes(hashlib.sha256(arm.encode()).digest()[:8], "big")
    return np.random.default_rng([seed, name])


def hierarchical_means(
    runs: Rates, samples: int, random: np.random.Generator
) -> NDArray[np.float64]:
    """Return `samples` bootstrap means: training runs are drawn, then rollouts within each draw."""
    sizes = np.array([len(run) for run in runs])
    padded = np.zeros((len(runs), int(sizes.max())))
    for row, run in zip(padded, runs, strict=True):
        row[: len(run)] = run
    total, count = np.zeros(samples), np.zeros(samples)
    for _ in runs:
        drawn = random.integers(len(runs), size=samples)
        size = sizes[drawn]
        for rollout in range(padded.shape[1]):
            values = padded[drawn, random.integers(size)]
            total += np.where(rollout < size, values, 0.0)
        count += size
    return total / count


def pooled_means(runs: Rates, samples: int, random: np.random.Generator) -> NDArray[np.float64]:
    """Return `samples` bootstrap means: rollouts are drawn, whichever training run's they are."""
    return hierarchical_means([[rate for run in runs for rate in run]], samples, random)


def percentile_interval(
    difference: float, arm: NDArray[np.float64], baseline: NDArray[np.float64]
) -> Interval:
    """Return the percentile interval of two arms' bootstrap means, drawn independently."""
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(arm - baseline, [tail, 1 - tail])
    return Interval(difference=difference, low=float(low), high=float(high))


def welch(arm: Rates, baseline: Rates) -> Interval | None:
    """Return Welch's t interval on the means of training runs; None with one run in an arm.

    Variances may differ; degrees of freedom by Welch and Satterthwaite (Welch 1947, Biometrika 34).
    """
    if min(len(arm), len(baseline)) < 2:
        return None
    means = [np.array([np.mean(run) for run in runs]) for runs in (arm, baseline)]
    parts = [float(values.var(ddof=1)) / len(values) for values in means]
    difference = float(means[0].mean() - means[1].mean())
    variance = sum(parts)
    if variance == 0:
        return Interval(difference=difference, low=difference, high=difference)
    freedom = 1 / sum(
        (part / variance) ** 2 / (len(values) - 1)
        for part, values in zip(parts, means, strict=True)
    )
    half = t_quantile((1 + CONFIDENCE) / 2, freedom) * math.sqrt(variance)
    return Interval(difference=difference, low=difference - half, high=difference + half)


def t_quantile(probability: float, freedom: float) -> float:
    """Return the quantile of Student's t, for a probability of at least one half.

    The upper tail is I_x(freedom/2, 1/2)/2 at x = freedom / (freedom + t^2) (Abramowitz and Stegun
    26.5.27 and 26.7.1); it is inverted by halving an interval until two floats are neighbours.
    """
    low, high = 0.0, 1.0
    while _t_tail(high, freedom) > 1 - probability:
        high *= 2
    while low < (middle := (low + high) / 2) < high:
        if _t_tail(middle, freedom) > 1 - probability:
            low = middle
        else:
            high = middle
    return high


def _t_tail(t: float, freedom: float) -> float:
    return incomplete_beta(freedom / 2, 0.5, freedom / (freedom + t * t)) / 2


def incomplete_beta(a: float, b: float, x: float) -> float:
    """Return the regularized incomplete beta function I_x(a, b).

    By its continued fraction (Abramowitz and Stegun 26.5.8), evaluated from the front by the method
    of Lentz; beyond the mean by I_x(a, b) = 1 - I_{1-x}(b, a), where it converges fast.
    """
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):
        return 1 - incomplete_beta(b, a, 1 - x)
    log_front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    log_front += a * math.log(x) + b * math.log1p(-x)
    tiny = 1e-300
    c, d = 1.0, 1 / _away_from_zero(1 - (a + b) * x / (a + 1), tiny)
    fraction = d
    for m in range(1, 10_000):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for term in (even, odd):
            d = 1 / _away_from_zero(1 + term * d, tiny)
            c = _away_from_zero(1 + term / c, tiny)
            fraction *= c * d
        if abs(c * d - 1) < 1e-15:
            break
    return math.exp(log_front) * fraction / a


def _away_from_zero(value: float, tiny: float) -> float:
    return value if abs(value) > tiny else tiny
