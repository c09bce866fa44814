"""Labels -> the weight of every step of a token directory, and which of its rows a recipe takes.

All steps at once, as columns. A label is looked up only where the recipe weights by label.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from srft_prep.config import PackConfig
from srft_prep.errors import LabelError
from srft_prep.judgements import Judgements
from srft_prep.token_columns import OUTCOME_CODES, TokenColumns
from srft_prep.types import LABELS
from srft_prep.weights import RECIPES

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, kw_only=True)
class StepWeights:
    """What a recipe makes of token rows."""

    rows: "NDArray[np.bool_]"
    """Whether the recipe takes each row, [R]."""
    weights: "NDArray[np.float64]"
    """Of each step, [S], before parts and characters."""
    judged: "NDArray[np.bool_]"
    """Whether a step is weighted by its label, [S]."""


def weigh_steps(
    columns: TokenColumns, judgements: Judgements | None, config: PackConfig, counts: Counter[str]
) -> StepWeights:
    """Return which rows a recipe takes and the weight of every step.

    Raises:
        LabelError: a label is missing and `missing_label` is `error`, or all are.
    """
    recipe = RECIPES[config.recipe]
    treatments = {code: recipe.treatment(outcome) for outcome, code in OUTCOME_CODES.items()}
    taken = _chosen(columns, [code for code, each in treatments.items() if each != "left out"])
    by_label = _chosen(columns, [code for code, each in treatments.items() if each == "by label"])
    counts["left_out"] = int((~taken).sum())
    span_rows = columns.span_rows()
    judged = by_label[span_rows]
    weights = np.ones(len(columns.steps))
    if judgements is not None:
        labels = np.full(len(weights), -1, np.int8)
        labels[judgements.spans] = judgements.labels
        missing = _rows_with(columns, span_rows[judged & (labels < 0)])
        any_label = bool((labels[judged] >= 0).any())
        _refuse_missing(columns, missing, labels, config, counts, any_label=any_label)
        _count_stale(columns, judgements, by_label, counts)
        if config.missing_label == "drop":
            taken &= ~missing
            judged &= taken[span_rows]
        chances = None
        if config.soft:
            chances = np.full((len(weights), len(LABELS)), np.nan)
            chances[judgements.spans] = judgements.probabilities
            hard = judged & (labels >= 0) & np.isnan(chances).any(axis=1)
            counts["steps_without_probabilities"] = int(hard.sum())
        found = label_weights(labels, config.weights, chances)
        weights = np.where(judged, found, weights)
    return StepWeights(rows=taken, weights=weights, judged=judged)


def label_weights(
    labels: "NDArray[np.int8]",
    weights: Mapping[str, float],
    probabilities: "NDArray[np.floating] | None" = None,
) -> "NDArray[np.float64]":
    """Return the weights of steps, [N], by their labels, or as expected values (`--soft`).

    Args:
        labels: index of each step's label in `LABELS`; -1 where it has none: weight 0.
        weights: the weight of each label.
        probabilities: of good, unnecessary, harmful, [N, 3]; a row of NaN has none and is weighted
            by its label.
    """
    by_label = np.array([*(weights[label] for label in LABELS), 0.0])
    found = by_label[labels]
    if probabilities is None:
        return found
    expected = (probabilities.astype(np.float64) * by_label[: len(LABELS)]).sum(axis=1)
    return np.where(np.isnan(expected) | (labels < 0), found, expected)


def _chosen(columns: TokenColumns, codes: list[int]) -> "NDArray[np.bool_]":
    return np.isin(columns.outcomes, np.array(codes, np.int8))


def _rows_with(columns: TokenColumns, rows: "NDArray[np.int32]") -> "NDArray[np.bool_]":
    found = np.zeros(columns.num_rows, np.bool_)
    found[rows] = True
    return found


def _refuse_missing(
    columns: TokenColumns,
    missing: "NDArray[np.bool_]",
    labels: "NDArray[np.int8]",
    config: PackConfig,
    counts: Counter[str],
    *,
    any_label: bool,
) -> None:
    counts["missing_label"] = int(missing.sum())
    if not missing.any():
        return
    if config.missing_label == "error":
        row = int(missing.argmax())
        spans = slice(columns.span_offsets[row], columns.span_offsets[row + 1])
        steps = columns.steps[spans][labels[spans] < 0]
        raise LabelError(
            f"{columns.names[columns.trajectories[row]]}: no label for step {steps[0]} "
            f"({len(steps)} missing); run label again, or choose --missing-label drop|mask"
        )
    if not any_label:
        raise LabelError(
            f"none of the {counts['missing_label']} trajectories that the recipe weights by "
            "label has a label: were these labels made for other trajectories, or only for other "
            "outcomes (label --only all)?"
        )


def _count_stale(
    columns: TokenColumns,
    judgements: Judgements,
    by_label: "NDArray[np.bool_]",
    counts: Counter[str],
) -> None:
    stale = np.zeros(len(columns.names), np.bool_)
    stale[judgements.stale_trajectories] = True
    has_steps = np.diff(columns.span_offsets) > 0
    if number := int((stale[columns.trajectories] & by_label & has_steps).sum()):
        counts["stale_labels"] = number
