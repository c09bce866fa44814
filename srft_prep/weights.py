"""Labels -> step weights, and the recipes of the paper's six training sets: pure functions.

    recipe             resolved   unresolved   unknown     in the paper (Tables 2, 4 and 5)
    naive              1          1            1           naive distillation
    rft                1          -            -           RFT
    unresolved         -          1            -           5k Unresolved
    unresolved-masked  -          by label     -           5k Unresolved masked
    srft               1          by label     by label    SRFT
    srft-all           by label   by label     by label    both masked (Table 5)

`1` takes every step whole, `by label` weights each step by its label (0 for harmful, 1 for the
others unless said otherwise), `-` leaves the trajectory out. A step's weight is w_{i,t} of the
paper's section 3.2; a step of weight 0 stays in the context. Where nobody knows the outcome, a
trajectory counts as one that may hold mistakes: it is masked where unresolved ones are, and is
in no set that is defined by its outcome.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from srft_prep.errors import ConfigError
from srft_prep.types import LABELS, Label

Treatment = Literal["whole", "by label", "left out"]

MAX_WEIGHT: Final = 3.4028234663852886e38
"""The largest float32: weights are stored in that type."""

DEFAULT_WEIGHTS: Final[dict[Label, float]] = {"good": 1.0, "unnecessary": 1.0, "harmful": 0.0}
"""The paper's: good and unnecessary steps are productive, harmful ones are not trained."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Which trajectories make a training set, and which of them are weighted by labels."""

    resolved: Treatment
    unresolved: Treatment
    unknown: Treatment

    def treatment(self, resolved: bool | None) -> Treatment:
        """Return what happens to a trajectory of an outcome."""
        if resolved is None:
            return self.unknown
        return self.resolved if resolved else self.unresolved

    @property
    def needs_labels(self) -> bool:
        """Whether any trajectory is weighted by labels."""
        return "by label" in (self.resolved, self.unresolved, self.unknown)


RECIPES: Final = {
    "naive": Recipe(resolved="whole", unresolved="whole", unknown="whole"),
    "rft": Recipe(resolved="whole", unresolved="left out", unknown="left out"),
    "unresolved": Recipe(resolved="left out", unresolved="whole", unknown="left out"),
    "unresolved-masked": Recipe(resolved="left out", unresolved="by label", unknown="left out"),
    "srft": Recipe(resolved="whole", unresolved="by label", unknown="by label"),
    "srft-all": Recipe(resolved="by label", unresolved="by label", unknown="by label"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class StepJudgement:
    """What a critic said of one step, as far as weights need it."""

    label: Label
    probabilities: tuple[float, float, float] | None = None
    """Of good, unnecessary, harmful."""


def is_distribution(probabilities: Sequence[float]) -> bool:
    """Return whether probabilities lie in [0, 1] and sum to 1 within 0.001 (they are float32)."""
    return all(0 <= p <= 1 for p in probabilities) and abs(math.fsum(probabilities) - 1) <= 1e-3


def step_weight(
    judgement: StepJudgement, weights: Mapping[Label, float], *, soft: bool = False
) -> float:
    """Return the weight of a step; with `soft` the expected weight under the probabilities.

    A step without probabilities is weighted by its label also with `soft`.
    """
    if not soft or judgement.probabilities is None:
        return weights[judgement.label]
    return math.fsum(
        weights[label] * probability
        for label, probability in zip(LABELS, judgement.probabilities, strict=True)
    )


def step_weights(
    treatment: Treatment,
    judgements: Sequence[StepJudgement],
    weights: Mapping[Label, float],
    *,
    num_steps: int,
    soft: bool = False,
) -> list[float]:
    """Return the weights of a trajectory's steps, [num_steps]."""
    if treatment == "whole":
        return [1.0] * num_steps
    assert len(judgements) == num_steps
    return [step_weight(judgement, weights, soft=soft) for judgement in judgements]


def parse_weights(text: str) -> dict[Label, float]:
    """Return the weights of `good=1,unnecessary=1,harmful=0`; labels left out keep the default.

    Raises:
        ConfigError: an unknown label, one given twice, or a weight that is no finite float32 >= 0.
    """
    weights = dict(DEFAULT_WEIGHTS)
    given: set[Label] = set()
    for item in text.split(","):
        name, _, number = (part.strip() for part in item.partition("="))
        try:
            weight = float(number)
        except ValueError:
            weight = math.nan
        label = next((label for label in LABELS if label == name), None)
        if label is None or not 0 <= weight <= MAX_WEIGHT:
            raise ConfigError(
                f"--weights: expected label=number with a label of {', '.join(LABELS)} and a "
                f"finite number >= 0, got {item.strip()!r}"
            )
        if label in given:
            raise ConfigError(f"--weights: expected each label once, got {label} again")
        given.add(label)
        weights[label] = weight + 0.0  # -0 becomes 0
    return weights
