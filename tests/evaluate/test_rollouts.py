import csv
import json
from pathlib import Path

import pytest

from srft_prep.errors import ConfigError, FormatError, SrftError
from srft_prep.evaluate.rollouts import COLUMNS, read_arms, read_summary

ALL = [f"repo__{number}" for number in range(8)]


def write_summary(path: Path, resolved: list[str], **more: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"resolved_ids": resolved, **more}), encoding="utf-8")
    return path


def write_csv(path: Path, rows: list[tuple[object, ...]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([COLUMNS, *rows])
    return path


def test_a_folder_and_a_csv_of_the_same_rollouts_give_the_same_rates(tmp_path: Path) -> None:
    rows: list[tuple[object, ...]] = []
    for run, rollout, count in (("seed1", "a", 3), ("seed1", "b", 5), ("seed2", "a", 0)):
        path = tmp_path / "arm" / run / f"{rollout}.json"
        write_summary(path, ALL[:count], unresolved_ids=ALL[count:])
        rows += [("x", run, rollout, one, str(one in ALL[:count])) for one in ALL]
    table = write_csv(tmp_path / "all.csv", rows)
    folder, sheet = read_arms([("folder", tmp_path / "arm"), ("x", table)])
    assert {run: [one.rate for one in them] for run, them in folder.runs.items()} == {
        "seed1": [37.5, 62.5],
        "seed2": [0.0],
    }
    for one, other in zip(folder.rollouts, sheet.rollouts, strict=True):
        assert (one.training_run, one.name, one.resolved) == (
            other.training_run,
            other.name,
            other.resolved,
        )


def test_a_csv_gives_each_arm_its_own_rows(tmp_path: Path) -> None:
    rows = [(arm, 1, 1, one, int(arm == "b")) for arm in "ab" for one in ALL]
    table = write_csv(tmp_path / "all.csv", rows)
    arms = read_arms([("b", table), ("a", table)])
    assert [arm.rollouts[0].rate for arm in arms] == [100.0, 0.0]


def test_a_total_counts_instances_that_no_list_names(tmp_path: Path) -> None:
    rollout = read_summary(write_summary(tmp_path / "run" / "a.json", ALL[:2], total_instances=8))
    assert rollout.rate == 25.0
    assert rollout.training_run == "run"


def test_instances_without_an_answer_are_counted_as_not_resolved(tmp_path: Path) -> None:
    path = write_summary(
        tmp_path / "run" / "a.json", ALL[:2], submitted_ids=ALL[:6], incomplete_ids=ALL[6:]
    )
    rollout = read_summary(path)
    assert (rollout.rate, rollout.num_submitted, rollout.num_instances) == (25.0, 6, 8)


@pytest.mark.parametrize(
    ("summary", "says"),
    [
        ({"resolved_ids": ALL[:2]}, "add total_instances"),
        ({"unresolved_ids": ALL}, "a list resolved_ids"),
        ({"resolved_ids": ALL, "total_instances": 7}, "its lists name 8"),
        ({"resolved_ids": [], "total_instances": 0}, "total_instances is 0"),
        ({"resolved_ids": ALL, "total_instances": "8"}, "expected a whole number, got '8'"),
        ({"resolved_ids": [1], "total_instances": 8}, "expected a list of instance ids"),
        ({"resolved_ids": [ALL[1]] * 2, "total_instances": 8}, f"{ALL[1]} is there twice"),
        ({"resolved_ids": ALL, "resolved_instances": 3, "total_instances": 8}, "names 8"),
        (
            {"resolved_ids": ALL, "unresolved_ids": ALL[3:5]},
            f"{ALL[3]} stands in resolved_ids and in unresolved_ids",
        ),
        ([1, 2], "a list resolved_ids"),
    ],
)
def test_a_summary_that_cannot_be_right_is_an_error_naming_it(
    tmp_path: Path, summary: object, says: str
) -> None:
    path = tmp_path / "run" / "a.json"
    path.parent.mkdir()
    path.write_text(json.dumps(summary), encoding="utf-8")
    with pytest.raises(FormatError) as caught:
        read_summary(path)
    assert str(path) in str(caught.value)
    assert says in str(caught.value)


def test_a_file_cut_short_is_an_error_naming_it(tmp_path: Path) -> None:
    write_summary(tmp_path / "run" / "a.json", ALL, total_instances=8)
    broken = tmp_path / "run" / "b.json"
    broken.write_bytes((tmp_path / "run" / "a.json").read_bytes()[:-5])
    with pytest.raises(FormatError, match=r"b\.json: not JSON"):
        read_arms([("x", tmp_path)])


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"total_instances": 9}, "9 instances, but 8"),
        ({"unresolved_ids": [*ALL[3:7], "strange"]}, "strange is not among the instances"),
        ({"unresolved_ids": ALL[3:7]}, "7 instances, but 8"),
    ],
)
def test_rollouts_over_other_instances_are_refused_whatever_their_order(
    tmp_path: Path, other: dict[str, object], says: str
) -> None:
    write_summary(tmp_path / "a" / "run" / "a.json", ALL[:2], unresolved_ids=ALL[2:])
    path = write_summary(tmp_path / "b" / "run" / "b.json", ALL[:3], **other)
    arms = [("a", tmp_path / "a"), ("b", tmp_path / "b")]
    for order in (arms[::-1], arms):
        with pytest.raises(ConfigError) as caught:
            read_arms(order)
        assert str(path) in str(caught.value)
        assert "same instances" in str(caught.value)
    assert says in str(caught.value)


def test_more_names_than_instances_in_all_rollouts_together_are_refused(tmp_path: Path) -> None:
    write_summary(tmp_path / "run" / "a.json", ALL[:5], total_instances=8)
    write_summary(tmp_path / "run" / "b.json", [f"other{n}" for n in range(4)], total_instances=8)
    with pytest.raises(ConfigError, match="together name 9"):
        read_arms([("x", tmp_path)])


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([("x", 1, 1, "i", "maybe")], r":2: resolved: expected true or false, got 'maybe'"),
        ([("x", 1, 1, "i", 1), ("x", 1, 1, "i", 0)], ":3: i is there twice"),
        ([("x", "", 1, "i", 1)], ":2: training_run is empty"),
        ([("x", 1, 1, "i")], ":2: resolved is empty"),
        ([("y", 1, 1, "i", 1), ("z", 1, 1, "i", 1)], "no rows of the arm 'x'; its arms: y, z"),
    ],
)
def test_a_broken_table_is_an_error_naming_the_line(
    tmp_path: Path, rows: list[tuple[object, ...]], says: str
) -> None:
    with pytest.raises(SrftError, match=says):
        read_arms([("x", write_csv(tmp_path / "t.csv", rows))])


def test_a_table_without_a_column_names_it(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("arm,rollout,instance_id,resolved\nx,1,i,1\n")
    with pytest.raises(FormatError, match="no column training_run"):
        read_arms([("x", tmp_path / "t.csv")])


def test_folders_that_hold_no_rollouts_say_what_is_expected(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no rollouts"):
        read_arms([("x", tmp_path)])
    (tmp_path / "run").mkdir()
    with pytest.raises(ConfigError, match="no rollout"):
        read_arms([("x", tmp_path)])
    write_summary(tmp_path / "a.json", ALL, total_instances=8)
    with pytest.raises(ConfigError, match="outside of a training run"):
        read_arms([("x", tmp_path)])


def test_an_arm_given_twice_is_refused(tmp_path: Path) -> None:
    write_summary(tmp_path / "run" / "a.json", ALL, total_instances=8)
    with pytest.raises(ConfigError, match="given twice"):
        read_arms([("x", tmp_path), ("x", tmp_path)])
