import math
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from srft_prep.errors import ConfigError
from srft_prep.step_weights import label_weights
from srft_prep.types import LABELS, Label
from srft_prep.weights import DEFAULT_WEIGHTS, PARTS, RECIPES, parse_weights
from tests import strategies

PRODUCTIVE, MASKED, ABSENT = [1.0, 1.0, 1.0], [1.0, 1.0, 0.0], None

PAPER = {
    # Table 2 and the first three rows of Table 5
    "rft": (PRODUCTIVE, ABSENT),
    "naive": (PRODUCTIVE, PRODUCTIVE),
    "srft": (PRODUCTIVE, MASKED),
    # Table 4: "5k Unresolved" and "5k Unresolved masked"
    "unresolved": (ABSENT, PRODUCTIVE),
    "unresolved-masked": (ABSENT, MASKED),
    # Table 5: "5k Resolved (masked) + 5k Unresolved (masked)"
    "srft-all": (MASKED, MASKED),
}

each_label_weight = st.fixed_dictionaries(
    {label: st.floats(0, 100, allow_subnormal=False) for label in LABELS}
)


def weights_of(recipe: str, resolved: bool | None) -> list[float] | None:
    """Weights of a trajectory with a good, an unnecessary and a harmful step, in this order."""
    treatment = RECIPES[recipe].treatment(resolved)
    if treatment == "left out":
        return None
    if treatment == "whole":
        return [1.0] * len(LABELS)
    return label_weights(np.arange(len(LABELS), dtype=np.int8), DEFAULT_WEIGHTS).tolist()


def step_weight(
    label: Label, weights: Mapping[Label, float], chances: Sequence[float] | None = None
) -> float:
    """Weight of one step; with its probabilities, where they are given."""
    labels = np.array([LABELS.index(label)], np.int8)
    if chances is None:
        return float(label_weights(labels, weights)[0])
    return float(label_weights(labels, weights, np.array([chances]))[0])


def test_the_recipes_are_those_of_the_paper() -> None:
    table = {name: (weights_of(name, True), weights_of(name, False)) for name in RECIPES}
    assert table == PAPER


def test_an_unknown_outcome_is_masked_like_an_unresolved_one_and_in_no_set_by_outcome() -> None:
    assert {name: weights_of(name, None) for name in RECIPES} == {
        "naive": PRODUCTIVE,
        "rft": ABSENT,
        "unresolved": ABSENT,
        "unresolved-masked": ABSENT,
        "srft": MASKED,
        "srft-all": MASKED,
    }


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_needs_labels_exactly_if_some_trajectory_has_weights_that_differ(
    name: str,
) -> None:
    differs = any(weights_of(name, resolved) == MASKED for resolved in (True, False, None))
    assert RECIPES[name].needs_labels is differs


@given(strategies.labels(), each_label_weight)
def test_without_soft_a_step_has_the_weight_of_its_label(
    label: Label, weights: dict[Label, float]
) -> None:
    assert step_weight(label, weights) == weights[label]
    assert step_weight(label, weights, [math.nan] * 3) == weights[label]


@given(each_label_weight, strategies.probabilities())
def test_a_step_without_a_label_has_no_weight(
    weights: dict[Label, float], chances: tuple[float, float, float]
) -> None:
    none = np.array([-1, -1], np.int8)
    assert label_weights(none, weights).tolist() == [0, 0]
    assert label_weights(none, weights, np.array([chances, [math.nan] * 3])).tolist() == [0, 0]


@given(strategies.labels(), each_label_weight)
def test_a_certain_critic_gives_the_same_weight_with_soft(
    label: Label, weights: dict[Label, float]
) -> None:
    certain = tuple(float(each == label) for each in LABELS)
    assert step_weight(label, weights, certain) == weights[label]


@given(strategies.labels(), strategies.probabilities(), each_label_weight)
def test_a_soft_weight_is_the_expected_value_between_the_least_and_the_greatest(
    label: Label, chances: tuple[float, float, float], weights: dict[Label, float]
) -> None:
    soft = step_weight(label, weights, chances)
    expected = sum(weights[name] * p for name, p in zip(LABELS, chances, strict=True))
    assert soft == pytest.approx(expected, rel=1e-12, abs=1e-300)
    slack = 1e-9 * max(weights.values()) + 1e-300
    assert min(weights.values()) - slack <= soft <= max(weights.values()) + slack


@given(strategies.probabilities(), each_label_weight, each_label_weight, st.floats(0, 10))
def test_soft_weights_are_linear_in_the_weights(
    chances: tuple[float, float, float],
    one: dict[Label, float],
    other: dict[Label, float],
    factor: float,
) -> None:
    def soft(weights: dict[Label, float]) -> float:
        return step_weight("good", weights, chances)

    both = {label: factor * one[label] + other[label] for label in LABELS}
    assert soft(both) == pytest.approx(factor * soft(one) + soft(other), rel=1e-9, abs=1e-12)


@given(strategies.probabilities(), st.floats(0, 1))
def test_under_default_weights_more_harm_never_means_more_weight(
    chances: tuple[float, float, float], share: float
) -> None:
    good, unnecessary, harmful = chances
    moved = good * share
    worse = (good - moved, unnecessary, harmful + moved)
    before, after = (step_weight("good", DEFAULT_WEIGHTS, each) for each in (chances, worse))
    assert after <= before + 1e-12
    assert before == pytest.approx(1 - harmful)


@given(each_label_weight)
def test_weights_read_back_as_they_were_written(weights: dict[Label, float]) -> None:
    text = ",".join(f" {label} = {weight!r} " for label, weight in weights.items())
    assert parse_weights(text) == weights


def test_labels_left_out_keep_their_default_weight() -> None:
    assert parse_weights("unnecessary=0.5") == {"good": 1.0, "unnecessary": 0.5, "harmful": 0.0}


def test_parts_are_weighted_beside_labels_and_only_where_they_are_named() -> None:
    text = "harmful=0.5,thought=0.25", "end_of_turn=2"
    assert parse_weights(*text) == {
        "good": 1.0,
        "unnecessary": 1.0,
        "harmful": 0.5,
        "thought": 0.25,
        "end_of_turn": 2.0,
    }


def test_minus_zero_is_zero() -> None:
    assert math.copysign(1, parse_weights("harmful=-0")["harmful"]) == 1


@pytest.mark.parametrize(
    "text",
    [
        "",
        "good",
        "good=",
        "=1",
        "great=1",
        "Good=1",
        "good=1,",
        "good=1;harmful=0",
        "good=one",
        "good=-1",
        "harmful=-1e-9",
        "good=nan",
        "good=inf",
        "good=1e39",
        "good=1=2",
    ],
)
def test_weights_that_are_none_are_refused_with_what_was_expected(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--weights: expected label=number .* got '"):
        parse_weights(text)


def test_a_label_given_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match="each label once, got good again"):
        parse_weights("good=1,harmful=0,good=2")
    with pytest.raises(ConfigError, match="each part once, got thought again"):
        parse_weights("thought=1", "thought=1")


@given(st.text(max_size=30))
@example("good=0x1p-3")
def test_any_text_is_weights_or_a_named_error(text: str) -> None:
    try:
        weights = parse_weights(text)
    except ConfigError:
        return
    assert [name for name in weights if name not in PARTS] == list(LABELS)
    assert all(math.isfinite(weight) and weight >= 0 for weight in weights.values())
