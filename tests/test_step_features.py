"""Features of steps: what their names say."""

import numpy as np
import polars as pl
import pytest

from srft_prep.ensembles import shares
from srft_prep.step_features import (
    OUTCOME,
    POSITION,
    critic_names,
    feature_matrix,
    rule_names,
)
from srft_prep.types import LABELS

STEPS = pl.DataFrame(
    {
        "trajectory_id": ["a", "b", "a", "a"],
        "step_index": [2, 0, 0, 1],
        "num_steps": [3, 1, 3, 3],
        "resolved": [False, None, False, False],
        "rules": [["loop"], [], ["edit-rejected", "loop"], []],
    },
    schema_overrides={"step_index": pl.Int32, "num_steps": pl.Int32},
)
MEMBER = pl.DataFrame(
    {
        "label": ["harmful", "good", "unnecessary", "good"],
        "p_good": [0.2, None, 0.3, 1.0],
        "p_unnecessary": [0.2, None, 0.5, 0.0],
        "p_harmful": [0.6, None, 0.2, 0.0],
    },
    schema_overrides={f"p_{label}": pl.Float32 for label in LABELS},
)


def column(name: str) -> list[float]:
    return feature_matrix([name], STEPS, [MEMBER])[:, 0].tolist()


def test_a_position_is_counted_within_its_trajectory() -> None:
    assert column("position:index") == [0.2, 0, 0, 0.1]
    assert column("position:fraction") == pytest.approx([2.5 / 3, 0.5, 0.5 / 3, 0.5])
    assert column("position:first") == [0, 1, 1, 0]
    assert column("position:last") == [1, 1, 0, 0]
    assert column("position:log_index") == pytest.approx(np.log([3, 1, 1, 2]))
    assert column("position:log_steps") == pytest.approx(np.log([3, 1, 3, 3]))


def test_an_unknown_outcome_is_neither() -> None:
    assert column("outcome:unresolved") == [1, 0, 1, 1]
    assert column("outcome:resolved") == [0, 0, 0, 0]


def test_rules_count_by_name_and_by_kind() -> None:
    assert column("rule:loop") == [1, 0, 1, 0]
    assert column("rule:edit-rejected") == [0, 0, 1, 0]
    assert column("rules:harmful") == [0, 0, 1, 0]
    assert column("rules:unnecessary") == [1, 0, 1, 0]


def test_what_stands_beside_a_step_is_of_its_own_trajectory() -> None:
    assert column("rule:loop@-1") == [0, 0, 0, 1]
    assert column("rule:loop@+1") == [0, 0, 0, 1]
    assert column("position:index@+1") == [0, 0, 0.1, 0.2]


def test_a_label_without_probabilities_is_certain() -> None:
    assert shares(MEMBER)[1].tolist() == [1, 0, 0]
    odds = column("critic[0]:log_odds_harmful")
    assert odds[0] == pytest.approx(np.log(0.6 / 0.4))
    assert odds[1] == odds[3] == pytest.approx(np.log(0.001 / 0.999))
    assert column("critic[0]:share_harmful") == pytest.approx([0.8 / 3, 0, 0.8 / 3, 0.8 / 3])


def test_the_order_of_rows_changes_no_feature() -> None:
    names = (*POSITION, *OUTCOME, *rule_names(), *critic_names(0, probabilities=True))
    order = [3, 1, 0, 2]
    turned = feature_matrix(names, STEPS[order], [MEMBER[order]])
    assert (turned == feature_matrix(names, STEPS, [MEMBER])[order]).all()


@pytest.mark.parametrize(
    "name",
    [
        "position:colour",
        "rules:good",
        "rule:mood",
        "critic[1]:harmful",
        "critic[0]:mood",
        "?",
        "a:b",
    ],
)
def test_an_unknown_feature_is_no_column(name: str) -> None:
    with pytest.raises((KeyError, IndexError)):
        feature_matrix([name], STEPS, [MEMBER])
