"""Metrics of labels: every number is scikit-learn's, and laws hold for any labels."""

import warnings
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn import metrics
from sklearn.calibration import calibration_curve

from srft_prep.label_metrics import (
    HARMFUL,
    accuracy,
    average_precision,
    binary,
    calibration_error,
    cohen_kappa,
    confusion,
    macro_f1,
    reliability,
    scores,
)

Codes = NDArray[np.int8]

codes = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=60).map(
    lambda pairs: np.array(pairs, np.int8).T
)
ranked = st.lists(
    st.tuples(st.booleans(), st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.9, 1.0]), st.integers(0, 3)),
    min_size=1,
    max_size=60,
)


def quietly(function: Callable[[], float]) -> float:
    """Call scikit-learn where it warns that a number is not defined: we test what we say then."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function()


@given(codes)
def test_precision_recall_and_f1_are_those_of_scikit_learn(pair: tuple[Codes, Codes]) -> None:
    gold, own = pair
    expected = metrics.precision_recall_fscore_support(gold, own, labels=[0, 1, 2], zero_division=0)
    for ours, theirs in zip(scores(confusion(gold, own)), expected[:3], strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-12)


@given(codes)
def test_accuracy_macro_f1_and_kappa_are_those_of_scikit_learn(pair: tuple[Codes, Codes]) -> None:
    gold, own = pair
    matrix = confusion(gold, own)
    assert accuracy(matrix) == pytest.approx(metrics.accuracy_score(gold, own))
    assert macro_f1(matrix) == pytest.approx(
        metrics.f1_score(gold, own, average="macro", zero_division=0)
    )
    kappa = quietly(lambda: metrics.cohen_kappa_score(gold, own))
    assert cohen_kappa(matrix) == pytest.approx(kappa, nan_ok=True)


@given(codes)
def test_the_confusion_matrix_is_that_of_scikit_learn(pair: tuple[Codes, Codes]) -> None:
    gold, own = pair
    expected = metrics.confusion_matrix(gold, own, labels=[0, 1, 2])
    assert (confusion(gold, own) == expected).all()
    two = metrics.confusion_matrix(gold == HARMFUL, own == HARMFUL, labels=[False, True])
    assert (binary(confusion(gold, own)) == two).all()


@given(ranked)
def test_average_precision_is_that_of_scikit_learn_whatever_the_ties_and_weights(
    rows: list[tuple[bool, float, int]],
) -> None:
    positive, chances = np.array([row[0] for row in rows]), np.array([row[1] for row in rows])
    weights = np.array([row[2] for row in rows])
    stack = np.stack([np.ones(len(rows)), weights])
    ours = average_precision(positive, chances, weights=stack)
    for own, weighting in zip(ours, stack, strict=True):
        if not (positive & (weighting > 0)).any():
            assert np.isnan(own)
            continue
        theirs = metrics.average_precision_score(positive, chances, sample_weight=weighting)
        assert own == pytest.approx(theirs)
    assert average_precision(positive, chances) == pytest.approx(ours[0], nan_ok=True)


@given(ranked)
def test_the_reliability_curve_is_that_of_scikit_learn(rows: list[tuple[bool, float, int]]) -> None:
    positive, chances = np.array([row[0] for row in rows]), np.array([row[1] for row in rows])
    came, promised = calibration_curve(positive, chances, n_bins=10, strategy="uniform")
    filled = [each for each in reliability(positive, chances) if each.count]
    np.testing.assert_allclose([each.harmful_share for each in filled], came)
    np.testing.assert_allclose([each.mean_probability for each in filled], promised)
    assert sum(each.count for each in filled) == len(rows)
    gap = sum(
        each.count * abs(share - chance)
        for each, share, chance in zip(filled, came, promised, strict=True)
    )
    assert calibration_error(filled) == pytest.approx(gap / len(rows))


@given(codes, st.randoms(use_true_random=False))
def test_the_order_of_steps_changes_nothing(pair: tuple[Codes, Codes], random: object) -> None:
    gold, own = pair
    order = np.arange(len(gold))
    random.shuffle(order)  # type: ignore[attr-defined]
    assert (confusion(gold, own) == confusion(gold[order], own[order])).all()


@given(codes)
def test_swapping_the_two_sides_swaps_precision_with_recall(pair: tuple[Codes, Codes]) -> None:
    gold, own = pair
    one, other = scores(confusion(gold, own)), scores(confusion(own, gold))
    np.testing.assert_allclose(one.precision, other.recall)
    np.testing.assert_allclose(one.f1, other.f1)


@given(st.lists(st.integers(0, 2), min_size=1, max_size=40))
def test_a_critic_that_says_what_people_say_is_perfect(labels: list[int]) -> None:
    gold = np.array(labels)
    matrix = confusion(gold, gold)
    assert accuracy(matrix) == 1
    assert macro_f1(matrix) == 1
    found = scores(matrix)
    occurs = np.isin([0, 1, 2], gold)
    assert (found.f1 == occurs).all()
    assert np.isnan(cohen_kappa(matrix)) if occurs.sum() == 1 else cohen_kappa(matrix) == 1
    harmful = gold == HARMFUL
    if harmful.any():
        assert average_precision(harmful, harmful.astype(float)) == 1


@given(st.lists(codes, min_size=1, max_size=4))
def test_a_stack_of_matrices_is_a_loop_over_them(pairs: list[tuple[Codes, Codes]]) -> None:
    gold, own = np.concatenate(pairs, axis=1)
    groups = np.repeat(np.arange(len(pairs)), [pair.shape[1] for pair in pairs])
    stack = confusion(gold, own, groups=groups, num_groups=len(pairs))
    for number, pair in enumerate(pairs):
        alone = confusion(*pair)
        assert (stack[number] == alone).all()
        assert cohen_kappa(stack)[number] == pytest.approx(cohen_kappa(alone), nan_ok=True)
        assert macro_f1(stack)[number] == macro_f1(alone)
        assert (scores(stack).f1[number] == scores(alone).f1).all()
    assert (binary(stack)[0] == binary(stack[0])).all()


def test_no_steps_at_all_give_no_number() -> None:
    none = np.zeros(0, np.int8)
    matrix = confusion(none, none)
    assert accuracy(matrix) == 0
    assert np.isnan(cohen_kappa(matrix))
    assert np.isnan(average_precision(none.astype(bool), none.astype(float)))
    assert np.isnan(calibration_error(reliability(none.astype(bool), none.astype(float))))
