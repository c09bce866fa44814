"""Gold joined with labels: what can be judged, what is left out, and what is refused."""

import shutil
from pathlib import Path

import polars as pl
import pytest

from srft_prep.errors import ConfigError, LabelError
from srft_prep.evaluate.agreement import agreements, disagreements
from srft_prep.evaluate.critic_labels import read_critics, trajectories_of
from srft_prep.evaluate.gold_steps import join_gold
from srft_prep.gold import read_gold
from srft_prep.manifest import read_manifest
from tests.evaluate.critic_sets import opened, write_gold
from tests.stages import (
    ListedCritic,
    label_row,
    run_critic,
    trajectory,
    write_labels,
    write_trajectories,
)

ONE, TWO = trajectory("one", num_steps=4), trajectory("two", num_steps=2, resolved=True)


@pytest.fixture
def labels(tmp_path: Path) -> Path:
    write_trajectories(tmp_path / "trajectories", [ONE, TWO])
    run_critic(tmp_path / "trajectories", tmp_path / "labels", ListedCritic())
    return tmp_path / "labels"


def test_steps_without_gold_or_label_are_left_out_and_counted(tmp_path: Path, labels: Path) -> None:
    gold = write_gold(
        tmp_path / "gold.jsonl",
        {("one", 3): "harmful", ("one", 0): "good", ("elsewhere", 0): "good"},
    )
    steps, _ = opened(gold, labels)
    assert steps.steps.filter(pl.Series(steps.judged))["step_index"].to_list() == [0, 3]
    assert steps.harmful.tolist() == [False, True]
    assert steps.counts["gold_steps"] == 3
    assert steps.counts["without_label_of labels"] == 1
    assert steps.counts["labels_without_gold"] == 2, "those of trajectory two are nobody's matter"
    assert steps.has_facts
    assert steps.steps["resolved"].to_list() == [False] * 4
    assert steps.groups == ["task one"] * 2


def test_trajectories_are_found_where_the_labels_were_made_and_after_a_move(
    tmp_path: Path, labels: Path
) -> None:
    (critic,) = read_critics([(None, labels)])
    found = trajectories_of([critic])
    assert found is not None
    assert found.path == tmp_path / "trajectories"
    moved = tmp_path / "moved"
    moved.mkdir()
    labels.rename(moved / "labels")
    (tmp_path / "trajectories").rename(moved / "trajectories")
    (critic,) = read_critics([(None, moved / "labels")])
    found = trajectories_of([critic])
    assert found is not None
    assert found.path == moved / "trajectories"


def test_other_trajectories_in_the_same_place_are_not_taken(tmp_path: Path, labels: Path) -> None:
    write_trajectories(tmp_path / "trajectories", [TWO])
    assert trajectories_of(read_critics([(None, labels)])) is None
    gold = write_gold(tmp_path / "gold.jsonl", {("one", 0): "good", ("two", 1): "harmful"})
    steps, _ = opened(gold, labels)
    assert not steps.has_facts
    assert steps.steps["num_steps"].to_list() == [4, 4, 4, 4, 2, 2], "as long as their labels"
    assert steps.groups == ["run one", "run two"]


def test_gold_of_another_version_of_a_trajectory_is_refused(tmp_path: Path, labels: Path) -> None:
    gold = write_gold(tmp_path / "gold.jsonl", {("one", 1): "good"}, content_hash="0" * 32)
    with pytest.raises(LabelError, match="one: step 1 was labelled in another version of the traj"):
        opened(gold, labels)
    right = write_gold(
        tmp_path / "right.jsonl", {("one", 1): "good"}, content_hash=ONE.content_hash
    )
    assert opened(right, labels)[0].judged.sum() == 1


def test_labels_of_another_version_than_the_trajectories_are_refused(tmp_path: Path) -> None:
    write_trajectories(tmp_path / "trajectories", [trajectory("one", num_steps=4, text="new")])
    labels = write_labels(tmp_path / "labels", [label_row(ONE, 0, "good")])
    gold = read_gold([write_gold(tmp_path / "gold.jsonl", {("one", 0): "good"})])
    critics = read_critics([(None, labels)])
    source = read_manifest(tmp_path / "trajectories")
    with pytest.raises(LabelError, match="another version than the trajectories hold"):
        join_gold(gold, critics, source, rules=False)
    write_trajectories(tmp_path / "others", [TWO])
    with pytest.raises(LabelError, match="one has labels, and is not among the trajectories"):
        join_gold(gold, critics, read_manifest(tmp_path / "others"), rules=False)


def test_gold_of_a_step_that_is_not_there_is_refused(tmp_path: Path, labels: Path) -> None:
    gold = write_gold(tmp_path / "gold.jsonl", {("one", 0): "good", ("one", 9): "good"})
    with pytest.raises(LabelError, match="gold label of one: step 9"):
        opened(gold, labels)


def test_gold_and_labels_of_different_trajectories_are_no_study(
    tmp_path: Path, labels: Path
) -> None:
    gold = write_gold(tmp_path / "gold.jsonl", {("elsewhere", 0): "good"})
    with pytest.raises(LabelError, match="gold has elsewhere step 0, the labels have one"):
        opened(gold, labels)
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(LabelError, match="the gold files hold no label"):
        opened(tmp_path / "empty.jsonl", labels)


def test_a_step_labelled_twice_is_refused(tmp_path: Path) -> None:
    labels = write_labels(tmp_path / "labels", [label_row(ONE, 0, "good")] * 2)
    with pytest.raises(LabelError, match="one: step 0 has two labels"):
        read_critics([(None, labels)])


def test_critics_are_called_by_id_and_by_question_where_they_share_one(
    tmp_path: Path, labels: Path
) -> None:
    other = write_labels(
        tmp_path / "other",
        [label_row(ONE, 0, "good", critic_id="listed@1", prompt_hash="asked otherwise")],
    )
    assert [each.name for each in read_critics([(None, labels)])] == ["listed@1"]
    names = [each.name for each in read_critics([(None, labels), ("mine", other)])]
    assert names == ["listed@1", "mine"]
    copy = tmp_path / "copy"
    labels.rename(copy)
    shutil.copytree(copy, tmp_path / "twin")
    with pytest.raises(ConfigError, match="two critics are called 'listed@1 none'; name them"):
        read_critics([(None, copy), (None, tmp_path / "twin")])
    with pytest.raises(ConfigError, match="copy is given twice; a critic agrees with itself"):
        read_critics([("a", copy), ("b", copy)])


@pytest.mark.parametrize("name", ["no critic", "flag last", "mean of 2", "calibrated", "threshold"])
def test_no_critic_has_the_name_of_another_row(labels: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=f"a critic is called '{name}', as is another row"):
        read_critics([(name, labels)])


def test_steps_that_annotators_label_differently_are_counted_once(
    tmp_path: Path, labels: Path
) -> None:
    ada = write_gold(tmp_path / "a", {("one", 0): "good", ("one", 1): "good"}, annotator="ada")
    bob = write_gold(tmp_path / "b", {("one", 1): "harmful"}, annotator="bob")
    found = join_gold(read_gold([ada, bob]), read_critics([(None, labels)]), None, rules=False)
    told = found.counts["judged_steps"], found.counts["annotators_disagree"]
    assert (*told, found.counts["labels_without_gold"]) == (1, 1, 2)


def test_disagreements_are_the_steps_that_critics_label_differently(
    tmp_path: Path, labels: Path
) -> None:
    rows = [label_row(ONE, step, "good") for step in range(4)]
    other = write_labels(tmp_path / "other", rows)
    critics = read_critics([("listed", labels), ("hand", other)])
    (found,) = agreements(critics)
    assert (found.steps, found.disagreements, found.agreement) == (4, 1, 0.75)
    assert list(disagreements(critics, {("one", 3): "harmful"})) == [
        {
            "trajectory_id": "one",
            "step_index": 3,
            "labels": {"listed": "harmful", "hand": "good"},
            "gold": "harmful",
        }
    ]
    alone = list(disagreements(critics[1:], {("one", 3): "harmful", ("one", 1): "good"}))
    assert [(row["step_index"], row["gold"]) for row in alone] == [(3, "harmful")]


def test_labels_of_different_versions_of_a_trajectory_are_not_compared(tmp_path: Path) -> None:
    old = write_labels(tmp_path / "old", [label_row(ONE, 0, "good"), label_row(TWO, 0, "good")])
    rows = [
        label_row(ONE, 0, "good"),
        label_row(TWO, 1, "good", content_hash="0" * 32),
    ]
    new = write_labels(tmp_path / "new", rows)
    with pytest.raises(LabelError, match=r"new: two: step 1 was labelled in another version"):
        read_critics([("old", old), ("new", new)])
    pl.read_parquet(new / "labels.parquet").drop("critic_id", "prompt_hash", "content_hash").filter(
        pl.col("trajectory_id") == "one"
    ).write_parquet(tmp_path / "file.parquet")
    assert len(read_critics([("old", old), ("file", tmp_path / "file.parquet")])) == 2
