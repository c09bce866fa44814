"""The no-critic regression: scikit-learn's numbers, and predictions that cannot have cheated."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score, log_loss
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from srft_prep.errors import ConfigError
from srft_prep.evaluate.regression import (
    FOLDS,
    INNER_FOLDS,
    STRENGTHS,
    best_threshold,
    fit,
    folds_of,
    outer_folds,
    predict_out_of_fold,
    threshold_out_of_fold,
)


def noisy(*, groups: int = 6, steps: int = 12, seed: int = 0) -> tuple:
    """Return features that say something of harmful, on scales far apart, and the groups."""
    random = np.random.default_rng(seed)
    features = random.normal(size=(groups * steps, 4)) * [1, 50, 0.02, 0] + [0, 200, 1, 3]
    odds = features[:, 0] + 0.02 * (features[:, 1] - 200) - 0.8
    harmful = random.random(len(odds)) < 1 / (1 + np.exp(-odds))
    return features, harmful, [f"task-{place % groups}" for place in range(groups * steps)]


def by_scikit_learn(features, harmful, strength):
    model = LogisticRegression(C=strength, solver="lbfgs", tol=1e-10, max_iter=10_000)
    return make_pipeline(StandardScaler(), model).fit(features, harmful)


def test_out_of_fold_predictions_are_those_of_a_plain_loop_over_scikit_learn() -> None:
    features, harmful, groups = noisy()
    found = predict_out_of_fold(features, harmful, groups)
    outer = folds_of(groups, min(FOLDS, 6), seed=0)
    for fold in range(outer.max() + 1):
        held = outer == fold
        x, y = features[~held], harmful[~held]
        inner = folds_of(np.array(groups)[~held].tolist(), INNER_FOLDS, seed=1)
        losses, kept = [], []
        for strength in STRENGTHS:
            chances = np.empty(len(y))
            for part in range(INNER_FOLDS):
                model = by_scikit_learn(x[inner != part], y[inner != part], strength)
                chances[inner == part] = model.predict_proba(x[inner == part])[:, 1]
            losses.append(log_loss(y, chances))
            kept.append(chances)
        best = int(np.argmin(losses))
        cuts = np.unique(kept[best])[::-1]
        f1 = [f1_score(y, kept[best] >= cut) for cut in cuts]
        place = int(np.argmax(f1))
        below = cuts[place + 1] if place + 1 < len(cuts) else -1.0
        model = by_scikit_learn(x, y, STRENGTHS[best])
        chances = model.predict_proba(features[held])[:, 1]
        np.testing.assert_allclose(found.probabilities[held], chances, atol=1e-6)
        np.testing.assert_allclose(found.f1[held], f1[place])
        threshold = (cuts[place] + below) / 2 if below >= 0 else below
        assert (found.flagged[held] == (chances >= threshold)).all()


def test_the_labels_of_a_task_have_no_part_in_its_own_predictions() -> None:
    features, harmful, groups = noisy()
    before = predict_out_of_fold(features, harmful, groups)
    own = np.array(groups) == "task-3"
    fold = next(held for held in outer_folds(groups, seed=0) if held[own].all())
    turned = np.where(own, ~harmful, harmful)
    after = predict_out_of_fold(features, turned, groups)
    assert (after.probabilities[fold] == before.probabilities[fold]).all()
    assert (after.flagged[fold] == before.flagged[fold]).all()
    assert (after.probabilities[~fold] != before.probabilities[~fold]).any()


@given(st.lists(st.text("abc", max_size=3), min_size=1, max_size=40), st.integers(1, 10))
def test_a_group_is_never_split_and_folds_hold_as_many_groups(names: list[str], count: int) -> None:
    folds = folds_of(names, count)
    assert len({(name, fold) for name, fold in zip(names, folds, strict=True)}) == len(set(names))
    sizes = np.bincount([folds[names.index(name)] for name in set(names)], minlength=count)
    assert sizes.max() - sizes.min() <= 1
    backwards = folds_of(names[::-1], count)
    assert (backwards[::-1] == folds).all()


@given(
    st.lists(
        st.tuples(st.booleans(), st.sampled_from([0.0, 0.2, 0.5, 0.7, 1.0])),
        min_size=1,
        max_size=20,
    )
)
def test_the_threshold_has_the_highest_f1_of_all(rows: list[tuple[bool, float]]) -> None:
    harmful, chances = np.array([row[0] for row in rows]), np.array([row[1] for row in rows])
    threshold, promised = best_threshold(harmful, chances)

    def f1(cut: float) -> float:
        flagged = chances >= cut
        return 2 * (flagged & harmful).sum() / max(1, flagged.sum() + harmful.sum())

    assert f1(threshold) == pytest.approx(promised)
    assert promised == pytest.approx(max(f1(cut) for cut in [*chances, 2.0]))
    if not harmful.any():
        assert not (chances >= threshold).any()


def test_a_threshold_out_of_fold_is_chosen_on_the_other_folds() -> None:
    _, harmful, groups = noisy()
    chances = np.random.default_rng(1).random(len(harmful))
    found = threshold_out_of_fold(chances, harmful, groups)
    for held in outer_folds(groups, seed=0):
        threshold, _ = best_threshold(harmful[~held], chances[~held])
        assert (found.flagged[held] == (chances[held] >= threshold)).all()
    assert (found.probabilities == chances).all()


def test_a_feature_that_never_varies_gets_no_weight() -> None:
    features, harmful, groups = noisy()
    assert fit(features, harmful, groups).coefficients[3] == 0


def test_one_class_alone_is_predicted_with_a_grain_of_doubt() -> None:
    features, _, groups = noisy()
    nothing = np.zeros(len(groups), np.bool_)
    found = predict_out_of_fold(features, nothing, groups)
    assert not found.flagged.any()
    assert ((found.probabilities > 0) & (found.probabilities < 0.1)).all()
    everything = predict_out_of_fold(features, ~nothing, groups)
    assert everything.flagged.all()


def test_a_single_task_cannot_be_cross_validated() -> None:
    features, harmful, groups = noisy()
    with pytest.raises(ConfigError, match="2 tasks or more, got 1"):
        predict_out_of_fold(features, harmful, ["one"] * len(groups))
