"""Fits a calibration to gold labels, and says by cross-validation what it is worth.

The candidates, from the simplest: a threshold on the critic's own P(harmful), then heads over what
critics say, over that with position and outcome, and over all of it with the rules' evidence.
Which one is taken is decided by each one's F1 on its own inner folds, and that choice is made anew
in every outer fold: the score of the row `calibrated` is that of the whole procedure, and nothing
was chosen on the steps that it is measured on. All folds are by task, or by trajectory where no
task is known.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import numpy as np

from srft_prep import __version__
from srft_prep.calibration import Calibration, FittedOn, Member
from srft_prep.critic.rules import RulesCritic
from srft_prep.ensembles import shares
from srft_prep.errors import ConfigError
from srft_prep.evaluate.baselines import known_names
from srft_prep.evaluate.critic import (
    Contrast,
    Judged,
    Row,
    contrast,
    judged_by,
    judged_critics,
    judged_no_critic,
    judged_trivial,
    measure,
)
from srft_prep.evaluate.critic_labels import CriticLabels
from srft_prep.evaluate.gold_steps import GoldSteps
from srft_prep.evaluate.regression import (
    Fit,
    Floats,
    Predictions,
    best_threshold,
    fit,
    predict_out_of_fold,
    threshold_out_of_fold,
)
from srft_prep.evaluate.resampling import Resampling
from srft_prep.hashes import sha256_of
from srft_prep.label_metrics import HARMFUL, scores
from srft_prep.step_features import critic_names, feature_matrix, rule_names

CALIBRATED: Final = "calibrated"
MIN_STEPS: Final = 5
"""Harmful gold steps that a calibration takes at least, and as many that are not."""
FEW_STEPS: Final = 30
"""Below so many of either, what is fitted is mostly chance, and the report says so."""
_RULES_CRITIC: Final = "rules@"


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One form that a calibration may take."""

    name: str
    features: tuple[str, ...]
    """None of a threshold on P(harmful)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitting:
    """A calibration and all that it was held against."""

    calibration: Calibration
    chosen: str
    """The candidate that became the calibration."""
    rows: list[Row]
    """Uncalibrated critics, no critic, every candidate, and the choice among them, out of fold."""
    folds: str
    """What folds are made of: tasks, or trajectories where no task is known."""
    contrasts: list[Contrast]
    """The choice against no critic, and against each uncalibrated critic."""
    as_it_is: Contrast
    """The one of them against the best uncalibrated critic, by F1."""
    position_does_it: bool
    """Whether the calibration looks at where a step stands, and nothing that leaves this out beats
    no critic."""


def fit_calibration(
    gold: GoldSteps,
    critics: Sequence[CriticLabels],
    gold_files: Sequence[Path],
    *,
    samples: int = 10_000,
    seed: int = 0,
) -> Fitting:
    """Return the calibration of critics to gold labels.

    Args:
        gold: the judged steps, joined with these critics' labels.
        critics: one, or several for a head over all of them.
        gold_files: the files that gold came from, for the record.
        samples: bootstrap samples.
        seed: of folds and bootstrap.

    Raises:
        ConfigError: labels that were calibrated before, files among several critics' labels, gold
            that holds one class only or a single task, or scikit-learn is not installed.
    """
    refuse_unfit(gold, critics)
    draws = Resampling(clusters=gold.clusters, samples=samples, seed=seed)
    given = [row for row in judged_critics(gold, critics, draws) if row.kind == "critic"]
    no_critic = judged_no_critic(gold, draws, seed=seed)
    options = candidates(gold, critics)
    found = {each.name: _out_of_fold(each, gold, seed=seed) for each in options}
    calibrated = judged_by(CALIBRATED, "critic", _chosen_by_fold(list(found.values())), gold, draws)
    fits = [_fit_all(each, gold, seed=seed) for each in options]
    best = int(np.argmax([each.f1 for each in fits]))
    others = [
        judged_by(name, "critic", predictions, gold, draws) for name, predictions in found.items()
    ]
    flag_all = judged_trivial(gold, draws)[0]
    rows = [measure(row) for row in (*given, flag_all, no_critic, *others, calibrated)]
    contrasts = [
        contrast(calibrated, no_critic, floor=flag_all),
        *(contrast(calibrated, row) for row in given),
    ]
    best_given = int(np.argmax([_f1(row) for row in given]))
    blind = [
        row for row, each in zip(others, options, strict=True) if not _looks_at_place(each.features)
    ]
    uses_rules = any(name.startswith("rule") for name in options[best].features)
    calibration = Calibration(
        kind="head" if options[best].features else "threshold",
        members=tuple(
            Member(critic_id=critic.critic_id, prompt_hash=critic.prompt_hash) for critic in critics
        ),
        threshold=fits[best].threshold,
        features=options[best].features,
        coefficients=tuple(fits[best].coefficients.tolist()),
        intercept=fits[best].intercept,
        rules=RulesCritic().prompt_hash if uses_rules else None,
        fitted_on=FittedOn(
            gold=tuple(str(sha256_of(path)) for path in gold_files),
            trajectories=gold.num_trajectories,
            steps=len(gold.gold),
            harmful=int(gold.harmful.sum()),
        ),
        scores={
            "out_of_fold": {
                row.name: {name: asdict(each) for name, each in row.harmful.items()} for row in rows
            },
            "calibrated_against": {
                each.other: {"f1": asdict(each.f1), "verdict": each.verdict} for each in contrasts
            },
        },
        package_version=__version__,
    )
    return Fitting(
        calibration=calibration,
        chosen=options[best].name,
        rows=rows,
        folds=gold.folds,
        contrasts=contrasts,
        as_it_is=contrasts[1 + best_given],
        position_does_it=_looks_at_place(options[best].features)
        and not any(contrast(row, no_critic, floor=flag_all).flags_better for row in blind),
    )


def candidates(gold: GoldSteps, critics: Sequence[CriticLabels]) -> list[Candidate]:
    """Return the forms that these critics and what is known of the steps allow, simplest first.

    What the rules critic says is left out where the rules' own evidence is looked at.
    """
    said = [
        critic_names(place, probabilities=critic.has_probabilities)
        for place, critic in enumerate(critics)
    ]
    every = tuple(name for names in said for name in names)
    known = known_names(gold)
    words = " and ".join(dict.fromkeys(name.partition(":")[0] for name in known))
    found = [
        Candidate(name="head: critic", features=every),
        Candidate(name=f"head: critic, {words}", features=(*every, *known)),
    ]
    if len(critics) == 1 and critics[0].has_probabilities:
        found.insert(0, Candidate(name="threshold", features=()))
    if not gold.steps["rules"].null_count():
        models = tuple(
            name
            for critic, names in zip(critics, said, strict=True)
            if not critic.critic_id.startswith(_RULES_CRITIC)
            for name in names
        )
        name = f"head: {'critic, ' if models else ''}rules, {words}"
        found.append(Candidate(name=name, features=(*models, *rule_names(), *known)))
    return found


def refuse_unfit(gold: GoldSteps, critics: Sequence[CriticLabels]) -> None:
    """Refuse what cannot be calibrated.

    Raises:
        ConfigError: what `why_unfit` tells.
    """
    if (why := why_unfit(gold, critics)) is not None:
        raise ConfigError(f"--calibrate: {why}")


def why_unfit(gold: GoldSteps, critics: Sequence[CriticLabels]) -> str | None:
    """Return why nothing can be fitted and what to do; None where something can."""
    files = [critic.path for critic in critics if critic.is_file]
    if files and len(critics) > 1:
        return (
            f"{files[0]}: a file does not say whose labels it holds, and label --ensemble head "
            "takes critics that it can ask; give directories that label wrote, or the file alone"
        )
    joint = [critic.path for critic in critics if critic.together]
    if joint and len(critics) > 1:
        return (
            f"{joint[0]}: holds what several critics say together, and label --ensemble head takes "
            "single critics; give the labels of each, or this directory alone"
        )
    for critic in critics:
        if critic.calibrated:
            return (
                f"{critic.path}: these labels went through a calibration already; label again "
                "without --calibration (nothing is asked twice) and calibrate those"
            )
    harmful = int(gold.harmful.sum())
    others = len(gold.gold) - harmful
    if not harmful or not others:
        which = "harmful" if harmful else "not harmful"
        return f"all {len(gold.gold)} gold steps are {which}; label some of the other kind"
    if min(harmful, others) < MIN_STEPS:
        return (
            f"expected {MIN_STEPS} or more gold steps that are harmful, and as many that are not, "
            f"got {harmful} and {others}; label more ({FEW_STEPS} of each tell something)"
        )
    if gold.num_groups < 2:
        return "expected gold labels of 2 tasks or more, got 1; label steps of another task"
    return None


def _out_of_fold(candidate: Candidate, gold: GoldSteps, *, seed: int) -> Predictions:
    if not candidate.features:
        return threshold_out_of_fold(_own(gold), gold.harmful, gold.groups, seed=seed)
    return predict_out_of_fold(_matrix(candidate, gold), gold.harmful, gold.groups, seed=seed)


def _fit_all(candidate: Candidate, gold: GoldSteps, *, seed: int) -> Fit:
    if not candidate.features:
        threshold, f1 = best_threshold(gold.harmful, _own(gold))
        return Fit(coefficients=np.zeros(0), intercept=0.0, threshold=threshold, f1=f1)
    return fit(_matrix(candidate, gold), gold.harmful, gold.groups, seed=seed + 1)


def _chosen_by_fold(found: Sequence[Predictions]) -> Predictions:
    """Return each step's prediction by the candidate that its own training folds preferred."""
    promised = np.stack([each.f1 for each in found])
    best = promised.argmax(axis=0)
    steps = np.arange(promised.shape[1])
    return Predictions(
        probabilities=np.stack([each.probabilities for each in found])[best, steps],
        flagged=np.stack([each.flagged for each in found])[best, steps],
        f1=promised[best, steps],
    )


def _f1(row: Judged) -> float:
    return float(scores(row.two[0]).f1[1])


def _looks_at_place(features: Sequence[str]) -> bool:
    return any(name.startswith(("position:", "outcome:")) for name in features)


def _matrix(candidate: Candidate, gold: GoldSteps) -> Floats:
    return feature_matrix(candidate.features, gold.steps, gold.members)[gold.judged]


def _own(gold: GoldSteps) -> Floats:
    """Return the one critic's P(harmful) of the judged steps."""
    own: Floats = shares(gold.members[0])[gold.judged, HARMFUL]
    return own
