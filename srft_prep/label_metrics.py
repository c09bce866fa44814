"""How well labels agree with others: confusion, precision, recall, F1, kappa, average precision.

Pure functions of arrays. Whatever is computed from a confusion matrix takes a stack of them: ten
thousand bootstrap samples are one call, since a sample's matrix is a sum of its clusters' matrices.
Rows are gold labels, columns the labels that are judged, in the order of `LABELS` (or not harmful,
harmful where there are two). A ratio without a denominator is 0, as in scikit-learn
(`zero_division=0`); a kappa or an average precision that means nothing is NaN.
"""

from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from srft_prep.types import LABELS

Floats = NDArray[np.float64]
Codes = NDArray[np.integer[Any]]
"""Indices of labels, [N]."""

HARMFUL: Final = LABELS.index("harmful")
BINS: Final = 10


class Scores(NamedTuple):
    """Precision, recall and F1 of each label, each [..., K]."""

    precision: Floats
    recall: Floats
    f1: Floats


@dataclass(frozen=True, slots=True, kw_only=True)
class ReliabilityBin:
    """Steps whose probability of being harmful lies in (low, high]; the first bin holds 0, too."""

    low: float
    high: float
    count: int
    mean_probability: float
    """NaN where the bin is empty."""
    harmful_share: float
    """Share of them that are harmful by the gold labels; NaN where the bin is empty."""


def confusion(
    gold: Codes,
    predicted: Codes,
    *,
    num_labels: int = len(LABELS),
    groups: Codes | None = None,
    num_groups: int | None = None,
) -> NDArray[np.int64]:
    """Return how often which gold label met which label, [K, K], or [G, K, K] by group.

    Args:
        gold: [N], each in [0, `num_labels`).
        predicted: [N], likewise.
        num_labels: K.
        groups: [N], the cluster of each pair, in [0, `num_groups`).
        num_groups: G; the highest group and one where it is None.
    """
    cells = np.asarray(gold, np.int64) * num_labels + predicted
    if groups is None:
        counts = np.bincount(cells, minlength=num_labels**2)
        return counts.astype(np.int64).reshape(num_labels, num_labels)
    if num_groups is None:
        num_groups = int(groups.max()) + 1 if len(groups) else 0
    cells = np.asarray(groups, np.int64) * num_labels**2 + cells
    counts = np.bincount(cells, minlength=num_groups * num_labels**2)
    return counts.astype(np.int64).reshape(num_groups, num_labels, num_labels)


def binary(matrix: NDArray[Any]) -> NDArray[Any]:
    """Return matrices of [not harmful, harmful], [..., 2, 2], from those of all labels."""
    rest = [index for index in range(len(LABELS)) if index != HARMFUL]
    rows = np.stack([matrix[..., rest, :].sum(axis=-2), matrix[..., HARMFUL, :]], axis=-2)
    columns: NDArray[Any] = np.stack(
        [rows[..., rest].sum(axis=-1), rows[..., HARMFUL]],
        axis=-1,
    )
    return columns


def scores(matrix: NDArray[Any]) -> Scores:
    """Return precision, recall and F1 of each label, from matrices [..., K, K]."""
    hits = np.diagonal(matrix, axis1=-2, axis2=-1).astype(np.float64)
    flagged, marked = matrix.sum(axis=-2), matrix.sum(axis=-1)
    return Scores(
        precision=_ratio(hits, flagged),
        recall=_ratio(hits, marked),
        f1=_ratio(2 * hits, flagged + marked),
    )


def accuracy(matrix: NDArray[Any]) -> Floats:
    """Return the share of pairs that agree, [...]; 0 where there is none."""
    return _ratio(np.trace(matrix, axis1=-2, axis2=-1), matrix.sum(axis=(-2, -1)))


def macro_f1(matrix: NDArray[Any]) -> Floats:
    """Return the mean F1 of the labels that occur on either side, [...]."""
    occurs = (matrix.sum(axis=-2) + matrix.sum(axis=-1)) > 0
    return _ratio((scores(matrix).f1 * occurs).sum(axis=-1), occurs.sum(axis=-1))


def cohen_kappa(matrix: NDArray[Any]) -> Floats:
    """Return the agreement beyond chance, [...] (Cohen 1960).

    (p_o - p_e) / (1 - p_e), where p_e is the agreement of two who draw from these margins; NaN
    where both sides know one label only, and it is the same, or there are no pairs.
    """
    total = matrix.sum(axis=(-2, -1)).astype(np.float64)
    margins = matrix.sum(axis=-2).astype(np.float64) * matrix.sum(axis=-1)
    chance = margins.sum(axis=-1)
    observed = np.trace(matrix, axis1=-2, axis2=-1) * total
    room = total * total - chance
    kappa: Floats = np.full(np.shape(total), np.nan)
    np.divide(observed - chance, room, out=kappa, where=room > 0)
    return kappa


def average_precision(
    positive: NDArray[np.bool_],
    probabilities: NDArray[np.floating[Any]],
    *,
    weights: NDArray[Any] | None = None,
) -> Floats:
    """Return the sum over thresholds of precision times the recall gained, [...].

    Steps of equal probability pass a threshold together, as in scikit-learn. NaN where nothing is
    positive. Costs one sort for any number of weightings.

    Args:
        positive: which steps are, [N].
        probabilities: the higher the likelier, [N].
        weights: how often each step counts, [..., N]; once where it is None.
    """
    order = np.argsort(-probabilities, kind="stable")
    ranked, hit = probabilities[order], positive[order]
    if weights is None:
        weights = np.ones(len(order))
    drawn = np.asarray(weights)[..., order]
    last_of_ties = np.flatnonzero(np.append(ranked[1:] != ranked[:-1], True))
    if not len(order):
        return np.full(drawn.shape[:-1], np.nan)
    taken = np.cumsum(drawn, axis=-1, dtype=np.float64)[..., last_of_ties]
    hits = np.cumsum(drawn * hit, axis=-1, dtype=np.float64)[..., last_of_ties]
    gained = np.diff(hits, axis=-1, prepend=0.0)
    total = hits[..., -1]
    area = (_ratio(hits, taken) * gained).sum(axis=-1)
    result: Floats = np.full(np.shape(total), np.nan)
    np.divide(area, total, out=result, where=total > 0)
    return result


def reliability(
    positive: NDArray[np.bool_], probabilities: NDArray[np.floating[Any]], *, bins: int = BINS
) -> list[ReliabilityBin]:
    """Return, for each of equally wide bins, what was promised and what came: a reliability curve.

    Bins are open below and closed above, the first closed on both sides, as in scikit-learn's
    `calibration_curve`.
    """
    edges = np.linspace(0.0, 1.0, bins + 1)
    places = np.searchsorted(edges[1:-1], probabilities)
    counts = np.bincount(places, minlength=bins)
    promised = np.bincount(places, weights=probabilities, minlength=bins)
    came = np.bincount(places, weights=positive, minlength=bins)
    return [
        ReliabilityBin(
            low=float(edges[place]),
            high=float(edges[place + 1]),
            count=int(counts[place]),
            mean_probability=float(promised[place] / counts[place]) if counts[place] else np.nan,
            harmful_share=float(came[place] / counts[place]) if counts[place] else np.nan,
        )
        for place in range(bins)
    ]


def calibration_error(curve: list[ReliabilityBin]) -> float:
    """Return how far promises are from what came, in the mean over steps; NaN without steps."""
    filled = [each for each in curve if each.count]
    total = sum(each.count for each in filled)
    gaps = (each.count * abs(each.mean_probability - each.harmful_share) for each in filled)
    return sum(gaps) / total if total else np.nan


def _ratio(part: NDArray[Any], whole: NDArray[Any]) -> Floats:
    result: Floats = np.zeros(np.broadcast_shapes(np.shape(part), np.shape(whole)))
    np.divide(part, whole, out=result, where=np.asarray(whole) > 0)
    return result
