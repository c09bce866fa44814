"""Laws of ensembles, and what each rule makes of members that disagree."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from srft_prep.critic import StepLabel
from srft_prep.ensembles import HOWS, JUDGEMENT, combine
from srft_prep.ledger_labels import merged
from srft_prep.types import LABELS

SEVERITY = {label: number for number, label in enumerate(LABELS)}
SHARES = st.tuples(*[st.integers(0, 16)] * 3).filter(any).map(
    lambda parts: [part / sum(parts) for part in parts]
)  # fmt: skip
RATIONALES = st.none() | st.sampled_from(["rule: seen", "because"])
Member = list[dict[str, Any]]


@st.composite
def _row(draw: Any) -> dict[str, Any]:
    label = draw(st.sampled_from(LABELS))
    shares = draw(st.none() | SHARES) or [None] * 3
    names = (f"p_{name}" for name in LABELS)
    chances = dict(zip(names, shares, strict=True))
    return {"label": label, **chances, "rationale": draw(RATIONALES)}


@st.composite
def _members(draw: Any) -> list[Member]:
    length = draw(st.integers(0, 8))
    rows = st.lists(_row(), min_size=length, max_size=length)
    members: list[Member] = draw(st.lists(rows, min_size=1, max_size=4))
    return members


def frame(rows: Member) -> pl.DataFrame:
    return pl.DataFrame(rows, schema=JUDGEMENT)


def together(members: Sequence[Member], how: Any) -> Member:
    return combine([frame(rows) for rows in members], how).to_dicts()


def certain(*labels: str | None) -> Member:
    return [{"label": label, "rationale": None} for label in labels]


@settings(max_examples=50)
@given(_members())
def test_any_flags_what_a_member_flags_and_nothing_else(members: list[Member]) -> None:
    for step, row in enumerate(together(members, "any")):
        given_labels = [rows[step]["label"] for rows in members]
        assert row["label"] == max(given_labels, key=lambda label: SEVERITY[label])


@settings(max_examples=50)
@given(_members())
def test_majority_is_what_more_than_half_say(members: list[Member]) -> None:
    for step, row in enumerate(together(members, "majority")):
        votes = Counter(rows[step]["label"] for rows in members)
        for label, count in votes.items():
            if 2 * count > len(members):
                assert row["label"] == label
        assert (row["label"] == "harmful") == (2 * votes["harmful"] > len(members))


@settings(max_examples=50)
@given(_members(), st.sampled_from(HOWS), st.randoms())
def test_the_order_of_members_changes_no_label_and_no_probability(
    members: list[Member], how: Any, rng: Any
) -> None:
    mixed = rng.sample(members, len(members))
    one, other = together(members, how), together(mixed, how)
    for row, again in zip(one, other, strict=True):
        assert row["label"] == again["label"]
        for name in LABELS:
            assert row[f"p_{name}"] == pytest.approx(again[f"p_{name}"], abs=1e-6)


@settings(max_examples=50)
@given(_members().map(lambda members: members[:1]), st.sampled_from(HOWS))
def test_an_ensemble_of_one_is_its_member(members: list[Member], how: Any) -> None:
    assert together(members, how) == frame(members[0]).to_dicts()


@settings(max_examples=50)
@given(_members(), st.sampled_from(HOWS))
def test_members_that_agree_are_believed(members: list[Member], how: Any) -> None:
    same = [members[0]] * 3
    labels = [row["label"] for row in together(same, how)]
    if how != "mean":  # the likeliest label is not always the critic's own
        assert labels == [row["label"] for row in members[0]]
    assert together(same, how) == together([members[0]] * 2, how)


@settings(max_examples=50)
@given(_members())
def test_mean_is_what_votes_of_one_critic_make(members: list[Member]) -> None:
    for step, row in enumerate(together(members, "mean")):
        if len(members) == 1:
            continue
        answers = [StepLabel(step_index=0, **rows[step]) for rows in members]
        expected = merged(answers)
        assert row["label"] == expected.label
        for name in LABELS:
            assert row[f"p_{name}"] == pytest.approx(getattr(expected, f"p_{name}"), abs=1e-6)


@settings(max_examples=50)
@given(_members())
def test_probabilities_of_majority_and_mean_are_distributions(members: list[Member]) -> None:
    if len(members) > 1:
        for how in ("majority", "mean"):
            for row in together(members, how):
                assert sum(row[f"p_{name}"] for name in LABELS) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("how", HOWS)
def test_a_step_that_a_member_has_no_label_for_has_none(how: Any) -> None:
    rows = together([certain("harmful", "harmful"), certain(None, "harmful")], how)
    assert [row["label"] for row in rows] == [None, "harmful"]
    assert [rows[0][f"p_{name}"] for name in LABELS] == [None] * 3


def test_two_critics_that_disagree() -> None:
    members = [certain("harmful", "unnecessary"), certain("good", "good")]
    labels = {how: [row["label"] for row in together(members, how)] for how in HOWS}
    assert labels == {
        "any": ["harmful", "unnecessary"],
        "majority": ["good", "unnecessary"],
        "mean": ["harmful", "unnecessary"],
    }


def test_the_rationale_is_of_a_member_that_gave_the_label() -> None:
    members = [
        [{"label": "good", "rationale": "fine"}, {"label": "harmful", "rationale": None}],
        [{"label": "harmful", "rationale": "wrong"}, {"label": "harmful", "rationale": "bad"}],
    ]
    assert [row["rationale"] for row in together(members, "any")] == ["wrong", "bad"]


def test_members_that_do_not_fit_together_are_refused() -> None:
    with pytest.raises(ValueError, match=r"equal length, got \[1, 2\]"):
        together([certain("good"), certain("good", "good")], "any")
    with pytest.raises(ValueError, match="equal length, got"):
        combine([], "any")
    with pytest.raises(ValueError, match="expected one of any, majority, mean"):
        together([certain("good")], "all")
