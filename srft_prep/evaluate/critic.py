"""Is a critic right: its labels against people's, beside what costs nothing.

Rows are critics, ensembles of them, the trivial critics and the no-critic row, all over the same
steps. Every number has a 95% bootstrap interval clustered by task, and all rows see the same
samples, so that differences are paired. A critic is called better than no critic only where the
interval of the difference excludes zero, in harmful F1 and, where it gives probabilities, in
average precision, and where the same holds against flagging all. The no-critic row's predictions
are taken as given: its regression is not fitted anew in each sample.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from typing import Final, Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray

from srft_prep.ensembles import HOWS, combine, shares
from srft_prep.evaluate.baselines import NO_CRITIC, known_names, trivial_flags, without_critic
from srft_prep.evaluate.caveats import caveats
from srft_prep.evaluate.critic_labels import Cost, CriticLabels
from srft_prep.evaluate.gold_steps import GoldSteps
from srft_prep.evaluate.regression import Predictions
from srft_prep.evaluate.resampling import (
    Estimate,
    Resampling,
    estimate,
    estimate_of,
    with_gold,
)
from srft_prep.label_metrics import (
    HARMFUL,
    ReliabilityBin,
    Scores,
    accuracy,
    calibration_error,
    cohen_kappa,
    macro_f1,
    reliability,
    scores,
)
from srft_prep.types import LABELS

RowKind = Literal["critic", "ensemble", "trivial", "no critic"]
Matrices = tuple[NDArray[np.int64], NDArray[np.int64]]
"""Of the judged steps, and of every sample of them."""
Verdict = Literal[
    "better", "worse", "ranks better", "flags better", "flags worse", "not told apart"
]

_FLAGGED: Final = 1
"""Index of harmful where there are two labels."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One way to label the judged steps, and how right it is."""

    name: str
    kind: RowKind
    flagged: int
    """Steps that it calls harmful."""
    harmful: dict[str, Estimate]
    """precision, recall, f1, accuracy, kappa of harmful or not; average_precision where known."""
    labels: dict[str, dict[str, Estimate]]
    """precision, recall, f1 by label."""
    overall: dict[str, Estimate]
    """accuracy, macro_f1, kappa of three labels."""
    confusion: list[list[int]]
    """Gold labels down, this row's across, in the order of `LABELS`."""
    measured_steps: int | None = None
    """Steps with a probability; the others count as certain in average precision. None where there
    are no probabilities."""
    reliability: list[ReliabilityBin] | None = None
    """Of the measured steps; None where there are no probabilities."""
    calibration_error: float | None = None
    cost: Cost | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Contrast:
    """A row against another, by differences over the same samples."""

    row: str
    other: str
    f1: Estimate
    average_precision: Estimate | None
    """None where one of them has no probabilities."""
    floor: "Contrast | None" = None
    """The same against flag all, where the other is no critic: a guess may be unlucky, and who does
    no better than a constant is not to be praised for beating it."""

    @property
    def flags_better(self) -> bool:
        """Whether F1 is better beyond doubt, than the floor's, too."""
        return self.f1.low > 0 and (self.floor is None or self.floor.flags_better)

    @property
    def ranks_better(self) -> bool:
        """Whether average precision is better beyond doubt, than the floor's, too."""
        better = self.average_precision is not None and self.average_precision.low > 0
        return better and (self.floor is None or self.floor.ranks_better)

    @property
    def verdict(self) -> Verdict:
        """What may be said: better only by all measures that there are."""
        ranked = self.average_precision
        if self.flags_better and (ranked is None or self.ranks_better):
            return "better"
        if self.f1.high < 0 and (ranked is None or ranked.high < 0):
            return "worse"
        if self.ranks_better:
            return "ranks better"
        if self.flags_better:
            return "flags better"
        return "flags worse" if self.f1.high < 0 else "not told apart"


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """All that `critic-eval` tells of critics against gold."""

    counts: dict[str, int]
    num_trajectories: int
    num_steps: int
    num_harmful: int
    marks_unnecessary: bool
    """Whether gold does; else three labels cannot be judged."""
    knows: list[str]
    """What the no-critic row looks at: position, and outcome where it is known."""
    folds: str
    """What folds are made of: tasks, or trajectories where no task is known."""
    drawn_by: str
    """What a bootstrap sample draws whole: tasks, or trajectories where no task is known."""
    samples: int
    samples_without: dict[str, int]
    """Samples that hold no gold step of a label, by label: of those that gold knows."""
    rows: list[Row]
    against_no_critic: list[Contrast]
    """Of each critic and ensemble; of none where gold is of a single task, which nothing can be
    cross-validated on."""
    pairs: list[Contrast]
    """Of each critic with each earlier one."""
    warnings: list[str]


@dataclass(frozen=True, kw_only=True)
class Judged:
    """Labels of the J judged steps by one row, as they are and as every sample has them."""

    name: str
    kind: RowKind
    gold: GoldSteps
    draws: Resampling
    codes: NDArray[np.int8]
    """Index in `LABELS`, [J]."""
    probabilities: NDArray[np.float64] | None = None
    """P(harmful), [J]; of a step without one, what its label says: 0 or 1."""
    measured: NDArray[np.bool_] | None = None
    """Which of them have a probability, [J]; None where all do, or none."""
    cost: Cost | None = None

    @cached_property
    def two(self) -> Matrices:
        """Confusion of harmful or not: [2, 2] and [S, 2, 2]."""
        gold, own = self.gold.harmful.astype(np.int8), (self.codes == HARMFUL).astype(np.int8)
        return self.draws.matrices(gold, own, num_labels=2)

    @cached_property
    def three(self) -> Matrices:
        """Confusion of three labels: [3, 3] and [S, 3, 3]."""
        return self.draws.matrices(self.gold.gold, self.codes, num_labels=len(LABELS))

    @cached_property
    def ranked(self) -> tuple[float, NDArray[np.float64]] | None:
        """Average precision, of the steps and of every sample [S]; None without probabilities."""
        if self.probabilities is None:
            return None
        return self.draws.average_precisions(self.gold.harmful, self.probabilities)


def evaluate(
    gold: GoldSteps, critics: Sequence[CriticLabels], *, samples: int = 10_000, seed: int = 0
) -> Evaluation:
    """Return how right critics are, and whether they are worth asking.

    Args:
        gold: the judged steps, joined with these critics' labels.
        critics: in the order of the report.
        samples: bootstrap samples.
        seed: of the bootstrap and of the folds.

    Raises:
        ConfigError: scikit-learn is not installed.
    """
    draws = Resampling(clusters=gold.clusters, samples=samples, seed=seed)
    named = judged_critics(gold, critics, draws)
    none = [judged_no_critic(gold, draws, seed=seed)] if gold.num_groups > 1 else []
    trivial = judged_trivial(gold, draws)
    own = [row for row in named if row.kind == "critic"]
    return Evaluation(
        counts=gold.counts,
        num_trajectories=gold.num_trajectories,
        num_steps=len(gold.gold),
        num_harmful=int(gold.harmful.sum()),
        marks_unnecessary=gold.marks_unnecessary,
        knows=sorted({name.partition(":")[0] for name in known_names(gold)}, reverse=True),
        folds=gold.folds,
        drawn_by=gold.drawn_by,
        samples=samples,
        samples_without=_samples_without(trivial[0]),
        rows=[measure(row) for row in (*named, *trivial, *none)],
        against_no_critic=[
            contrast(row, no_critic, floor=trivial[0]) for no_critic in none for row in named
        ],
        pairs=[contrast(later, earlier) for earlier, later in combinations(own, 2)],
        warnings=caveats(gold, critics, samples=samples),
    )


def judged_critics(
    gold: GoldSteps, critics: Sequence[CriticLabels], draws: Resampling
) -> list[Judged]:
    """Return critics' labels of the judged steps, then those of their ensembles."""
    rows = [
        _judged(critic.name, "critic", member, gold, draws, cost=critic.cost)
        for critic, member in zip(critics, gold.members, strict=True)
    ]
    if len(critics) > 1:
        rows += [
            _judged(f"{how} of {len(critics)}", "ensemble", combine(gold.members, how), gold, draws)
            for how in HOWS
        ]
    return rows


def judged_no_critic(gold: GoldSteps, draws: Resampling, *, seed: int) -> Judged:
    """Return the no-critic row's out-of-fold labels."""
    return judged_by(NO_CRITIC, "no critic", without_critic(gold, seed=seed), gold, draws)


def judged_by(
    name: str, kind: RowKind, found: Predictions, gold: GoldSteps, draws: Resampling
) -> Judged:
    """Return the labels that a regression predicts."""
    return Judged(
        name=name,
        kind=kind,
        gold=gold,
        draws=draws,
        codes=codes_of(found.flagged),
        probabilities=found.probabilities,
    )


def judged_trivial(gold: GoldSteps, draws: Resampling) -> list[Judged]:
    """Return the trivial critics' labels, flag all first, which is as sure of every step."""
    return [
        Judged(
            name=name,
            kind="trivial",
            gold=gold,
            draws=draws,
            codes=codes_of(flags),
            probabilities=flags.astype(np.float64) if flags.all() else None,
        )
        for name, flags in trivial_flags(gold).items()
    ]


def measure(row: Judged) -> Row:
    """Return all numbers of a row, with their intervals."""
    harmful = _measures(row.two, _FLAGGED)
    harmful |= {
        "accuracy": estimate_of(accuracy, row.two),
        "kappa": estimate_of(cohen_kappa, row.two),
    }
    curve, num_measured = None, None
    if row.probabilities is not None and row.ranked is not None:
        harmful["average_precision"] = estimate(*row.ranked)
        known = np.ones(len(row.codes), np.bool_) if row.measured is None else row.measured
        curve = reliability(row.gold.harmful[known], row.probabilities[known])
        num_measured = int(known.sum())
    return Row(
        name=row.name,
        kind=row.kind,
        flagged=int((row.codes == HARMFUL).sum()),
        harmful=harmful,
        labels={label: _measures(row.three, place) for place, label in enumerate(LABELS)},
        overall={
            "accuracy": estimate_of(accuracy, row.three),
            "macro_f1": estimate_of(macro_f1, row.three),
            "kappa": estimate_of(cohen_kappa, row.three),
        },
        confusion=row.three[0].tolist(),
        measured_steps=num_measured,
        reliability=curve,
        calibration_error=None if curve is None else calibration_error(curve),
        cost=row.cost,
    )


def contrast(row: Judged, other: Judged, *, floor: Judged | None = None) -> Contrast:
    """Return the differences of two rows over the same samples, and those of `row` from `floor`."""
    whole, samples = (
        with_gold(scores(one).f1[..., _FLAGGED] - scores(two).f1[..., _FLAGGED], one, _FLAGGED)
        for one, two in zip(row.two, other.two, strict=True)
    )
    ranked = None
    if row.ranked is not None and other.ranked is not None:
        ranked = estimate(row.ranked[0] - other.ranked[0], row.ranked[1] - other.ranked[1])
    return Contrast(
        row=row.name,
        other=other.name,
        f1=estimate(float(whole), samples),
        average_precision=ranked,
        floor=None if floor is None else contrast(row, floor),
    )


def codes_of(flags: NDArray[np.bool_]) -> NDArray[np.int8]:
    """Return the labels, as indices in `LABELS`, of a row that only knows harmful and good."""
    return np.where(flags, HARMFUL, LABELS.index("good")).astype(np.int8)


def _measures(matrices: Matrices, place: int) -> dict[str, Estimate]:
    """Return precision, recall and F1 of one label."""
    whole, samples = map(scores, matrices)
    return {
        name: estimate(
            float(with_gold(value[place], matrices[0], place)),
            with_gold(drawn[:, place], matrices[1], place),
        )
        for name, value, drawn in zip(Scores._fields, whole, samples, strict=True)
    }


def _judged(
    name: str,
    kind: RowKind,
    member: pl.DataFrame,
    gold: GoldSteps,
    draws: Resampling,
    *,
    cost: Cost | None = None,
) -> Judged:
    measured = member["p_harmful"].is_not_null().to_numpy()[gold.judged]
    return Judged(
        name=name,
        kind=kind,
        gold=gold,
        draws=draws,
        codes=gold.codes(member["label"]),
        probabilities=shares(member)[gold.judged, HARMFUL] if measured.any() else None,
        measured=measured if measured.any() and not measured.all() else None,
        cost=cost,
    )


def _samples_without(row: Judged) -> dict[str, int]:
    whole, samples = row.three
    counts = (samples.sum(axis=-1) == 0).sum(axis=0)
    present = whole.sum(axis=-1) > 0
    return {label: int(counts[at]) for at, label in enumerate(LABELS) if present[at]}
