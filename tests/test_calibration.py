"""A calibration: a file that is checked, and labels that obey it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from srft_prep.calibration import (
    Calibration,
    FittedOn,
    Member,
    calibrated,
    needs_outcome,
    needs_rules,
    read_calibration,
    rules_fired,
    write_calibration,
)
from srft_prep.critic.rules import RulesCritic
from srft_prep.errors import ConfigError
from srft_prep.types import LABELS, Message, Trajectory

FITTED_ON = FittedOn(gold=("ab12",), trajectories=2, steps=9, harmful=3)
HEAD = Calibration(
    kind="head",
    members=(Member(critic_id="model@1", prompt_hash="ask"),),
    threshold=0.4,
    features=("critic[0]:log_odds_harmful", "position:last", "rule:loop"),
    coefficients=(0.5, 1.0, 2.0),
    intercept=-0.25,
    rules=RulesCritic().prompt_hash,
    fitted_on=FITTED_ON,
    scores={"out_of_fold": {"no critic": {"f1": {"value": 0.5, "low": 0.4, "high": 0.6}}}},
    package_version="0.1.0",
)
THRESHOLD = replace(HEAD, kind="threshold", features=(), coefficients=(), intercept=0.0, rules=None)


def steps_of(count: int) -> pl.DataFrame:
    return pl.DataFrame(
        {
            "trajectory_id": ["a"] * count,
            "step_index": range(count),
            "num_steps": [count] * count,
            "resolved": [None] * count,
            "rules": [["loop"] if step % 3 == 1 else [] for step in range(count)],
        },
        schema={
            "trajectory_id": pl.String,
            "step_index": pl.Int32,
            "num_steps": pl.Int32,
            "resolved": pl.Boolean,
            "rules": pl.List(pl.String),
        },
    )


def member_of(rows: list[tuple[str, tuple[float, float, float] | None]]) -> pl.DataFrame:
    chances = [given or (None, None, None) for _, given in rows]
    return pl.DataFrame(
        {
            "label": [label for label, _ in rows],
            **{f"p_{label}": [each[at] for each in chances] for at, label in enumerate(LABELS)},
            "rationale": [f"says {label}" for label, _ in rows],
        },
        schema={
            "label": pl.String,
            **{f"p_{label}": pl.Float32 for label in LABELS},
            "rationale": pl.String,
        },
    )


shares = st.tuples(*[st.floats(0.01, 1)] * 3).map(
    lambda parts: tuple(part / sum(parts) for part in parts)
)
members = st.lists(
    st.tuples(st.sampled_from(LABELS), st.none() | shares), min_size=1, max_size=12
).map(member_of)


def test_a_file_gives_back_what_was_written(tmp_path: Path) -> None:
    for calibration in (HEAD, THRESHOLD):
        write_calibration(tmp_path / "c.json", calibration)
        assert read_calibration(tmp_path / "c.json") == calibration
        assert orjson.loads((tmp_path / "c.json").read_bytes())["schema"] == 1


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"schema": 2}, "schema 2, this program reads 1; use the srft-prep version '0.1.0'"),
        ({"kind": "forest"}, "expected kind as one of threshold, head, got 'forest'"),
        ({"coefficients": [1.0]}, "a coefficient for each feature, got '1 coefficients'"),
        ({"threshold": "high"}, "threshold as a finite number, got 'high'"),
        ({"members": []}, "members as"),
        ({"members": [{"critic_id": 3, "prompt_hash": "x"}]}, "members as"),
        ({"members": ["rules"]}, "members and fitted_on"),
        ({"fitted_on": {}}, "members and fitted_on"),
        ({"rules": 7}, "rules as a hash"),
        ({"rules": "the rules!"}, "rules as a hash"),
        ({"rules": None}, "rules as a hash where features look at them, else null"),
        ({"threshold": 1.5}, "threshold as a probability from 0 to 1, got 1.5"),
        ({"threshold": -0.1}, "threshold as a probability from 0 to 1"),
        ({"coefficients": [1e7, 1.0, 1.0]}, "from -1,000,000 to 1,000,000, got 10000000.0"),
        ({"intercept": -1e300}, "from -1,000,000 to 1,000,000"),
        (
            {"features": ["position:last", "rule:loop", "position:last"]},
            "each feature once, got 'position:last'",
        ),
        ({"scores": []}, "scores as an object"),
        ({"colour": "red"}, "expected the keys schema, coefficients"),
        (
            {"features": ["position:last", "rule:loop", "critic[7]:harmful"]},
            r"knows no feature 'critic\[7\]:harmful'",
        ),
    ],
)
def test_what_is_wrong_with_a_file_is_said(
    tmp_path: Path, change: dict[str, Any], expected: str
) -> None:
    path = tmp_path / "c.json"
    write_calibration(path, HEAD)
    path.write_bytes(orjson.dumps(orjson.loads(path.read_bytes()) | change))
    with pytest.raises(ConfigError, match=expected) as error:
        read_calibration(path)
    assert str(error.value).startswith(f"{path}: ")


def test_no_file_and_no_json_are_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="critic-eval --calibrate -o FILE makes one"):
        read_calibration(tmp_path / "none.json")
    (tmp_path / "c.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot be read as a calibration"):
        read_calibration(tmp_path / "c.json")
    (tmp_path / "c.json").write_text("[]")
    with pytest.raises(ConfigError, match="expected a calibration"):
        read_calibration(tmp_path / "c.json")


@settings(max_examples=30)
@given(members, st.floats(0.05, 0.95))
def test_harmful_is_what_reaches_the_threshold_and_chances_sum_to_one(
    member: pl.DataFrame, threshold: float
) -> None:
    for calibration in (
        replace(HEAD, threshold=threshold),
        replace(THRESHOLD, threshold=threshold),
    ):
        found = calibrated(calibration, steps_of(member.height), [member])
        chances = found.select("p_good", "p_unnecessary", "p_harmful").to_numpy()
        np.testing.assert_allclose(chances.sum(axis=1), 1, atol=1e-5)
        reaches = found["p_harmful"].to_numpy() >= threshold
        assert ((found["label"] == "harmful").to_numpy() == reaches).all()
        own, rest = member["label"].to_numpy(), found["label"].to_numpy()
        kept = ~reaches & (own != "harmful")
        assert (rest[kept] == own[kept]).all()
        likelier = np.where(chances[:, 1] > chances[:, 0], "unnecessary", "good")
        fallen = ~reaches & (own == "harmful")
        assert (rest[fallen] == likelier[fallen]).all()


@settings(max_examples=30)
@given(members)
def test_a_threshold_leaves_probabilities_as_they_are(member: pl.DataFrame) -> None:
    found = calibrated(THRESHOLD, steps_of(member.height), [member])
    for label in LABELS:
        certain = (member["label"] == label).cast(pl.Float32)
        given_ = member[f"p_{label}"].fill_null(certain)
        np.testing.assert_allclose(found[f"p_{label}"], given_, atol=1e-6)


@settings(max_examples=30)
@given(members)
def test_a_threshold_that_rises_flags_no_more(member: pl.DataFrame) -> None:
    flagged = [
        (calibrated(replace(HEAD, threshold=cut), steps_of(member.height), [member])["label"])
        for cut in (0.2, 0.5, 0.8)
    ]
    for fewer, more in zip(flagged[1:], flagged, strict=False):
        assert not ((fewer == "harmful") & (more != "harmful")).any()


def test_a_head_is_the_logistic_function_of_its_features() -> None:
    member = member_of([("good", (0.5, 0.3, 0.2)), ("harmful", None), ("good", (0.1, 0.1, 0.8))])
    found = calibrated(HEAD, steps_of(3), [member])
    odds = [
        0.5 * np.log(0.2 / 0.8) - 0.25,
        0.5 * np.log(0.999 / 0.001) + 2 - 0.25,
        0.5 * np.log(0.8 / 0.2) + 1 - 0.25,
    ]
    np.testing.assert_allclose(found["p_harmful"], 1 / (1 + np.exp(-np.array(odds))), rtol=1e-5)
    assert found["label"].to_list() == ["good", "harmful", "harmful"]
    assert found["rationale"].to_list() == [
        "says good",
        "says harmful",
        "calibrated: P(harmful) 0.809, threshold 0.400",
    ]


def test_several_members_are_weighed_together() -> None:
    both = replace(
        HEAD,
        members=HEAD.members * 2,
        features=("critic[0]:harmful", "critic[1]:harmful"),
        coefficients=(1.0, 3.0),
        intercept=-2.0,
    )
    first = member_of([("harmful", None), ("good", None), ("unnecessary", None)])
    second = member_of([("good", None), ("harmful", None), ("unnecessary", None)])
    found = calibrated(both, steps_of(3), [first, second])
    assert found["label"].to_list() == ["good", "harmful", "unnecessary"]
    assert found["rationale"].to_list() == ["says good", "says harmful", "says unnecessary"]
    with pytest.raises(ConfigError, match="fitted with 2 critics, got the labels of 1"):
        calibrated(both, steps_of(3), [first])


def test_evidence_that_is_not_there_or_of_other_rules_is_refused() -> None:
    member = member_of([("good", None)])
    unknown = steps_of(1).with_columns(rules=pl.lit(None, pl.List(pl.String)))
    with pytest.raises(ConfigError, match="label --calibration"):
        calibrated(HEAD, unknown, [member])
    with pytest.raises(ConfigError, match="fitted with the rules old, this program has"):
        calibrated(replace(HEAD, rules="old"), steps_of(1), [member])
    assert calibrated(THRESHOLD, unknown, [member])["label"].to_list() == ["good"]


def test_what_a_calibration_needs_is_known_from_its_features() -> None:
    assert needs_rules(HEAD)
    assert not needs_rules(THRESHOLD)
    assert needs_rules(replace(HEAD, features=("rules:harmful@-1",) * 3))
    assert needs_outcome(replace(HEAD, features=("outcome:resolved",) * 3))
    assert not needs_outcome(HEAD)


def test_no_steps_are_no_labels() -> None:
    found = calibrated(HEAD, steps_of(0), [member_of([])])
    assert found.height == 0
    assert found.columns == ["label", "p_good", "p_unnecessary", "p_harmful", "rationale"]


def test_rules_that_fired_are_told_of_every_step() -> None:
    error = "Your proposed edit has introduced new syntax error(s). Please read this message"
    messages = (
        Message(role="user", kind="prompt", content="fix it"),
        Message(role="assistant", kind="action", content="look\n```\nls\n```"),
        Message(role="user", kind="observation", content="a.py"),
        Message(
            role="assistant", kind="action", content="edit\n```\nedit 1:1\nx=(\nend_of_edit\n```"
        ),
        Message(role="user", kind="observation", content=error),
    )
    run = Trajectory(trajectory_id="a", instance_id="a", format="swe-agent", messages=messages)
    found = rules_fired([run])
    expected = [[], []]
    for finding in RulesCritic().findings(run):
        expected[finding.step_index].append(finding.rule_id)
    assert expected[1], "the example must set off a rule"
    assert found["rules"].to_list() == expected
    assert found["step_index"].to_list() == [0, 1]
    assert found.schema["step_index"] == pl.Int32
    assert rules_fired([]).columns == ["trajectory_id", "step_index", "rules"]
